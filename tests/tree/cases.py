"""Layers and tokens for the tests of the three executions, and covering sets of their options."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tree_ffn.tree import TreeShape, TreeSpec, batched, grouped, tree_ffn

EXECUTIONS = ("masked", "gather", "grouped")
# Grouped has a second form for accelerators; this name runs it here.
BATCHED = "grouped in batched form"
ROUTINGS = ("hard", "straight_through", "continuous_min", "continuous_product")


def make_spec(routing="hard", P=2, D=2, W=1, S=0, **fields) -> TreeSpec:
    """A spec from short names; W "per_level" is 1, 2, ... below a root of 2."""
    if W == "per_level":
        W = (2, *range(1, D + 1))
    if routing.startswith("continuous_"):
        routing, fields["gate"] = routing.split("_")
    fields = {"kappa": 0.75, "beta": 1.5} | fields
    return TreeSpec(TreeShape(n_trees=P, depth=D, node_width=W, shared_width=S), routing=routing, **fields)


def on_grid(rng, *shape, step=0.25, size=1.25):
    """Multiples of `step` within [-size, size]: products and sums of a few are exact in float32."""
    n = round(size / step)
    return (rng.integers(-n, n + 1, shape) * step).astype(np.float32)


def output_rows(spec) -> int:
    """Rows of w_out of one tree: all units but a silent router in every node that decides by one."""
    silent = 2**spec.shape.depth - 2**spec.hash_levels if spec.router == "silent" else 0
    return spec.shape.tree_units - silent


def grid_case(rng, spec, T=13, E=6):
    """Weights, tokens and output gradients whose decision logits are exact in float32 and never 0.

    Inputs are multiples of 1/4, biases odd multiples of 1/32, thresholds multiples of 1/16: so |z| and |r|
    are at least 1/32, every execution must decide as the oracle does, and no activation is met at its kink.
    """
    shape = spec.shape
    P, U, S = shape.n_trees, shape.tree_units, shape.shared_width

    def bias(*dims):
        return on_grid(rng, *dims, step=0.0625, size=0.5) + np.float32(1 / 32)

    def normal(*dims):
        return rng.normal(0, 0.5, dims).astype(np.float32)

    params = {
        "w_in": on_grid(rng, P, U, E),
        "b_in": bias(P, U),
        "w_out": normal(P, output_rows(spec), E),
        "b_out": normal(E),
        "threshold": on_grid(rng, P, shape.n_nodes, step=0.0625, size=0.25),
    }
    if S:
        params["shared"] = {"w_in": on_grid(rng, S, E), "b_in": bias(S), "w_out": normal(S, E)}
    if spec.router == "frozen":
        params["router"] = {"w": on_grid(rng, P, shape.n_deciding, E)}
        params["threshold"] = params["threshold"] + np.float32(1 / 32)
    return params, on_grid(rng, T, E), normal(T, E)


def random_case(rng, spec, T=13, E=6, dtype=np.float32):
    """Normal weights and tokens; thresholds of about a tenth of a logit, in float32 always."""
    shape = spec.shape
    P, U, S = shape.n_trees, shape.tree_units, shape.shared_width

    def normal(*dims, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, dims), dtype)

    params = {
        "w_in": normal(P, U, E, scale=E**-0.5),
        "b_in": normal(P, U, scale=0.1),
        "w_out": normal(P, output_rows(spec), E, scale=shape.active_units**-0.5),
        "b_out": normal(E, scale=0.1),
        "threshold": jnp.asarray(rng.normal(0, 0.1, (P, shape.n_nodes)), jnp.float32),
    }
    if S:
        shared = {"w_in": normal(S, E, scale=E**-0.5), "b_in": normal(S, scale=0.1), "w_out": normal(S, E)}
        params["shared"] = shared
    return params, normal(T, E), normal(T, E)


def layer(params, x, spec, execution):
    """`tree_ffn`; differentiate it inside `traced_form(execution)`."""
    return tree_ffn(params, x, spec, "grouped" if execution == BATCHED else execution)


@contextlib.contextmanager
def traced_form(execution):
    """While functions are traced here, grouped takes the form that `execution` names."""
    with pytest.MonkeyPatch.context() as patch:
        if execution == BATCHED:
            patch.setattr(grouped, "_form", lambda: batched)
        yield


# Hundreds of small programs: most of the time goes into compiling them, so LLVM is told to hurry. And where a
# value is said to be bfloat16 it is rounded, lest XLA's own float32 hide a decision made in bfloat16.
compiled = functools.partial(
    jax.jit,
    static_argnames=("spec", "execution"),
    compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False},
)


@compiled
def run_forward(params, x, spec, execution):
    """Output and leaves."""
    with traced_form(execution):
        y, info = layer(params, x, spec, execution)
    return y, info.leaf_TP


def on_device(tree):
    """NumPy leaves as jax arrays."""
    return jax.tree.map(jnp.asarray, tree)


def all_combinations(factors: dict[str, tuple]) -> list[dict]:
    """The full product."""
    return [dict(zip(factors, values)) for values in itertools.product(*factors.values())]


def all_pairs(factors: dict[str, tuple]) -> list[dict]:
    """A small set of combinations that holds every pair of values of every two factors (greedy)."""
    names = list(factors)
    pairs = itertools.combinations(names, 2)
    missing = dict.fromkeys(((a, x), (b, y)) for a, b in pairs for x in factors[a] for y in factors[b])
    chosen = []
    while missing:
        case = dict(next(iter(missing)))
        for name in names:
            if name not in case:
                new = lambda v, a=name, case=case: sum(
                    _pair(names, a, v, n, case[n]) in missing for n in case
                )
                case[name] = max(factors[name], key=new)
        chosen.append({name: case[name] for name in names})
        for a, b in itertools.combinations(names, 2):
            missing.pop(_pair(names, a, case[a], b, case[b]), None)
    return chosen


def _pair(names, a, x, b, y):
    return ((a, x), (b, y)) if names.index(a) < names.index(b) else ((b, y), (a, x))
