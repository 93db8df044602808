"""Layers, weights and tokens for the tests of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec

# Hundreds of small programs: most of the time goes into compiling them, so LLVM is told to hurry. And where a
# value is said to be bfloat16 it is rounded, lest XLA's own float32 hide a decision made in bfloat16.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
)
BFLOAT16 = 2.0**-8  # rounding errs by at most so much of a number

# Leaf layers that have every option once, and its odd sizes.
LEAVES = {
    "tree": LeafSpec(n_experts=16, expert_width=2, top_k=3),
    "more_than_a_tree_has": LeafSpec(n_experts=16, expert_width=1, top_k=6, n_trees=4, gate_norm="l1"),
    "trees": LeafSpec(n_experts=24, expert_width=1, top_k=5, n_trees=3, gate_norm="none"),
    "one_best": LeafSpec(n_experts=8, expert_width=3, top_k=1, gate_norm="none", activation="tanh"),
    "all": LeafSpec(n_experts=4, expert_width=2, top_k=4),
    "no_decision": LeafSpec(n_experts=3, expert_width=2, top_k=3, n_trees=3, activation="silu"),
    "one_expert": LeafSpec(n_experts=1, expert_width=4, top_k=1, gate_norm="none"),
    "softmax": LeafSpec(n_experts=5, expert_width=3, top_k=2, router="softmax", gate_norm="l1"),
    "softmax_rms": LeafSpec(n_experts=6, expert_width=1, top_k=3, router="softmax", gate_norm="rms"),
    "softmax_plain": LeafSpec(n_experts=5, expert_width=3, top_k=1, router="softmax", gate_norm="none"),
    "product_keys": LeafSpec(n_experts=12, expert_width=2, top_k=3, router="product_keys", gate_norm="rms"),
    "random": LeafSpec(n_experts=7, expert_width=2, top_k=2, router="random", activation="gelu_tanh"),
    "hash": LeafSpec(n_experts=5, expert_width=3, top_k=1, router="hash", gate_norm="none"),
}


def make_spec(routing="hard", P=2, D=2, W=1, **fields) -> TreeSpec:
    """A path layer from short names; W "per_level" is 1, 2, ... below a root of 2."""
    if W == "per_level":
        W = (2, *range(1, D + 1))
    return TreeSpec(TreeShape(n_trees=P, depth=D, node_width=W), routing=routing, **fields)


def first_weights(init_params, spec, width: int, **options) -> dict:
    """What `init_params` draws, as one program: op by op there is more to compile."""
    return jit(lambda key: init_params(key, spec, width, **options))(jax.random.key(0))


def token_ids(n: int) -> np.ndarray:
    """Ids of so many tokens, for what reads them."""
    return np.arange(n, dtype=np.int32) % 7


def leaf_case(rng, spec: LeafSpec, T=20, E=6):
    """Weights of every name, biases not 0, tokens and an output's gradient, in float64."""
    units, rows = (spec.n_experts, spec.expert_width), spec.router_rows
    params = {
        "w_in": rng.normal(size=(*units, E)) / E**0.5, "b_in": rng.normal(size=units) / 5,
        "w_out": rng.normal(size=(*units, E)), "b_out": rng.normal(size=E),
    }  # fmt: skip
    if spec.router == "hash":
        params["salt"] = np.int32(7)
    else:
        w = rng.normal(size=(rows, E))
        params |= {"router": {"w": w}} if spec.router == "random" else {"w_router": w}
    if spec.router == "tree":
        params["b_router"] = rng.normal(size=rows) / 3
    if spec.balance_rate:
        params["selection_bias"] = rng.normal(size=rows if spec.router == "tree" else spec.n_experts) / 3
    return params, rng.normal(size=(T, E)), rng.normal(size=(T, E))


def on_grid(rng, *shape, step=0.25, size=1.25):
    """Multiples of `step` within [-size, size]: products and sums of a few are exact in float32."""
    n = round(size / step)
    return (rng.integers(-n, n + 1, shape) * step).astype(np.float32)


def grid_case(rng, spec: TreeSpec, T=13, E=6):
    """Weights, tokens and output gradients whose decision logits are exact in float32 and never 0.

    Inputs are multiples of 1/4, biases odd multiples of 1/32, thresholds multiples of 1/16: so |z| and |r|
    are at least 1/32, every implementation must decide as the oracle does, and no activation is met at its
    kink.
    """
    shape = spec.shape
    P, U = shape.n_trees, shape.tree_units
    normal = lambda *dims: rng.normal(0, 0.5, dims).astype(np.float32)
    params = {
        "w_in": on_grid(rng, P, U, E),
        "b_in": on_grid(rng, P, U, step=0.0625, size=0.5) + np.float32(1 / 32),
        "w_out": normal(P, U, E),
        "b_out": normal(E),
        "threshold": on_grid(rng, P, shape.n_nodes, step=0.0625, size=0.25),
    }
    if spec.router == "frozen":
        params["router"] = {"w": on_grid(rng, P, shape.n_deciding, E)}
        params["threshold"] = params["threshold"] + np.float32(1 / 32)
    return params, on_grid(rng, T, E), normal(T, E)


def random_case(rng, spec: TreeSpec, T=13, E=6, dtype=np.float32):
    """Normal weights and tokens; thresholds of about a tenth of a logit, in float32 always."""
    shape = spec.shape
    P, U = shape.n_trees, shape.tree_units
    normal = lambda *dims, scale=1.0: jnp.asarray(rng.normal(0, scale, dims), dtype)
    params = {
        "w_in": normal(P, U, E, scale=E**-0.5),
        "b_in": normal(P, U, scale=0.1),
        "w_out": normal(P, U, E, scale=shape.active_units**-0.5),
        "b_out": normal(E, scale=0.1),
        "threshold": jnp.asarray(rng.normal(0, 0.1, (P, shape.n_nodes)), jnp.float32),
    }
    return params, normal(T, E), normal(T, E)


def on_device(tree, dtype=jnp.float32):
    """Numbers as jax arrays of a dtype, integers as int32."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.int32 if np.asarray(a).dtype.kind == "i" else dtype), tree
    )


def assert_near(got, want, what="", tolerance=2e-5):
    """Largest error within `tolerance` of the largest entry (or of 1): float32 sums of a few dozen terms."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape, what
    error = np.max(np.abs(got - want), initial=0.0) / max(1.0, np.max(np.abs(want), initial=0.0))
    assert error <= tolerance, f"{what}: off by {error:.2e}"


def assert_same_gradients(got, want, what="", tolerance=2e-5):
    """The oracle's gradients, 0 wherever the oracle's is; what it has none of has none."""
    assert got.keys() >= want.keys(), what
    for name, value in got.items():
        if name not in want:  # thresholds and routers that are not trained
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(value)), f"{what} d{name}"
            continue
        assert_near(value, want[name], f"{what} d{name}", tolerance)
        assert not np.any(np.asarray(value)[want[name] == 0]), f"{what} d{name} beside the path"
