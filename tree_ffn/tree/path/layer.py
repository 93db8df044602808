"""The path layer whole: its first weights, its output, and what balances its load."""

from typing import Any

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree.activations import activation
from tree_ffn.tree.combine import combine, fastest, weighed, with_derivatives
from tree_ffn.tree.info import Info
from tree_ffn.tree.meshes import partitioned
from tree_ffn.tree.path import pruned
from tree_ffn.tree.path.route import decision_logits, route, straight_through, visits
from tree_ffn.tree.path.spec import PrunedSpec, TreeSpec
from tree_ffn.tree.undifferentiable import undifferentiable
from tree_ffn.tree.usage import sides


def init_params(
    key: jax.Array, spec: TreeSpec, width: int, *, w_in_scale=1.0, w_out_scale=1.0, param_dtype=jnp.float32
) -> dict:
    """Initial weights: normal w_in and w_out, zero biases and thresholds.

        std(w_in) = w_in_scale / sqrt(E),   std(w_out) = w_out_scale / sqrt(A)

    A, not F, is the fan-in of an output: that many units reach it.

    Args:
      key: random key.
      spec: the layer.
      width: E, of tokens.
      w_in_scale: of the standard deviation of w_in.
      w_out_scale: the same of w_out.
      param_dtype: of weights and biases; thresholds and routers are float32.

    Returns:
      {w_in [P,U,E], b_in [P,U], w_out [P,U,E], b_out [E], threshold [P,N]}, and {router: {w [P,R,E]}} of
      router `frozen`; thresholds and routers are not trained. Of a PrunedSpec, the arrays of `pruned` with
      some structure of these sizes.
    """
    keys = jax.random.split(key, 5)
    in_std, out_std = w_in_scale / width**0.5, w_out_scale / spec.active_units**0.5
    shapes = array_shapes(spec, width)
    normal = lambda key, name, std, dtype: (std * jax.random.normal(key, shapes[name])).astype(dtype)
    params = {
        "w_in": normal(keys[0], "w_in", in_std, param_dtype),
        "b_in": jnp.zeros(shapes["b_in"], param_dtype),
        "w_out": normal(keys[1], "w_out", out_std, param_dtype),
        "b_out": jnp.zeros(shapes["b_out"], param_dtype),
        "threshold": jnp.zeros(shapes["threshold"], jnp.float32),
    }
    if isinstance(spec, PrunedSpec):
        params |= jax.tree.map(jnp.asarray, pruned.init_structure(spec))
    if spec.router == "frozen":
        params["router"] = {"w": normal(keys[4], "router.w", in_std, jnp.float32)}
    return params


def array_shapes(spec: TreeSpec, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of every array that a layer needs, by its path in `params`."""
    shape = spec.shape
    if isinstance(spec, PrunedSpec):
        return {"b_out": (width,)} | pruned.array_shapes(spec, width)
    units = (shape.n_trees, shape.tree_units)
    shapes = {"w_in": (*units, width), "b_in": units, "w_out": (*units, width), "b_out": (width,)}
    shapes["threshold"] = (shape.n_trees, shape.n_nodes)
    if spec.router == "frozen":
        shapes["router.w"] = (shape.n_trees, shape.n_deciding, width)
    return shapes


def tree_ffn(
    params: dict, x_TE: jax.Array, spec: TreeSpec, implementation: str | None = None
) -> tuple[jax.Array, Info]:
    """A feed-forward layer of P trees: every token walks one hard path per tree.

        z[p,n,u] = <w_in[p,n,u], x> + b_in[p,n,u]
        r[p,n]   = z[p,n,0] - threshold[p,n]
        n_0 = 0;  n_{l+1} = 2 n_l + 1 + [r[p,n_l] > 0]
        y = b_out + sum_p sum_l sum_u act(z[p,n_l,u]) w_out[p,n_l,u]

    At `act_site="sum"` units enter the sum linearly, and y = b_out + act(sum).

    Args:
      params: see `init_params`.
      x_TE: tokens [T, E], float32 or bfloat16; weights are cast to its dtype, decision logits are float32.
      spec: the layer; static under jit.
      implementation: `masked`, `gather` or `grouped`; None picks one. All compute the same function, but
        `masked` alone trains straight-through decisions, whose gradient needs units beside the path.

    Returns:
      y_TE in x's dtype, and Info(leaf_TP).

    Raises:
      InputError: an unknown implementation, or tokens or weights that do not fit the spec.

    Example:
      >>> from tree_ffn.tree.shape import TreeShape
      >>> spec = TreeSpec(TreeShape(n_trees=2, depth=3))
      >>> params = init_params(jax.random.key(0), spec, width=8)
      >>> layer = jax.jit(tree_ffn, static_argnames="spec")
      >>> y_TE, info = layer(params, jnp.ones((5, 8)), spec)
      >>> y_TE.shape, info.leaf_TP.shape
      ((5, 8), (5, 2))

    Source: "Dynamic sparsity in tree-structured feed-forward layers at scale",
    arXiv 2604.08565; hard routing with exact GELU, W = 1 and b_out = 0 is the
    layer of UltraFastBERT, arXiv 2311.10770.
    """
    check_fit(params, x_TE, spec)

    def layer(params, x_TE):
        s_TE, leaf_TP = sum_of_paths(params, x_TE, spec, implementation)
        return finish(params, s_TE, spec), Info(leaf_TP)

    return partitioned(layer, x_TE)(params, x_TE)


def sum_of_paths(
    params: dict, x_TE: jax.Array, spec: TreeSpec, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(s_TE, leaf_TP): what the paths add up to, before `finish`; some trees give a part of the sum.

    Args:
      params: the layer's arrays, or those of some of its trees.
      x_TE: tokens.
      spec: the layer, or those trees.
      implementation: `masked`, `gather` or `grouped`; None: chosen by rule.
    """
    chosen = implementation or fastest(params, x_TE, spec)
    if chosen == "masked" and not isinstance(spec, PrunedSpec):
        return _everywhere(params, x_TE, spec)
    if implementation is None and spec.routing == "straight_through" and not isinstance(spec, PrunedSpec):
        return _learned_by_masked(params, x_TE, spec, chosen)
    said = (
        f"implementation: {chosen!r} cannot differentiate routing 'straight_through', whose gradient "
        "needs units beside the path; use 'masked', in a layer that is not pruned."
    )
    return _walked(params, x_TE, spec, implementation, said if spec.routing == "straight_through" else None)


def _walked(params, x_TE, spec: TreeSpec, implementation: str | None, said: str | None = None):
    """The units of the paths alone; `said` to whoever differentiates what needs those beside them."""
    ids_TP, gates_TP = route(params, x_TE, spec)
    if said is not None:
        gates_TP = undifferentiable(gates_TP, x_TE, said)
    s_TE = combine(params, x_TE, ids_TP, gates_TP, spec, implementation)
    return s_TE, params["leaf"][ids_TP] if isinstance(spec, PrunedSpec) else ids_TP % spec.shape.n_leaves


def _learned_by_masked(params, x_TE, spec: TreeSpec, implementation: str):
    """An implementation that walks one path, and masked, which sees those beside it, for its derivatives."""
    layer = with_derivatives(
        lambda params, x_TE: _walked(params, x_TE, spec, implementation),
        lambda params, x_TE: _everywhere(params, x_TE, spec),
    )
    return layer(params, x_TE)


def _everywhere(params, x_TE, spec: TreeSpec):
    """Masked, by the visits of all nodes, which decisions may learn through."""
    logits_TPR = decision_logits(params, x_TE, spec)
    learned = spec.routing == "straight_through"
    right_TPR = straight_through(logits_TPR) if learned else (logits_TPR > 0).astype(jnp.float32)
    levels = visits(right_TPR)
    leaf = jnp.arange(spec.shape.n_leaves, dtype=jnp.int32)
    leaf_TP = jnp.where(levels[-1] > 0.5, leaf[None, None], 0).sum(axis=-1)
    return weighed(params, x_TE, spec.of_units(levels), spec), leaf_TP


def finish(params: dict, s_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """y from the sum of the paths: the activation of site `sum`, and b_out.

    Args:
      params: the layer's, of which b_out is read.
      s_TE: sum of the paths of all trees.
      spec: the layer.
    """
    if spec.act_site == "sum":
        s_TE = activation(spec.activation)(s_TE.astype(jnp.float32)).astype(s_TE.dtype)
    return s_TE + params["b_out"].astype(s_TE.dtype)[None]


def balance_update(routing: dict, counts_PJ: jax.Array, spec: TreeSpec) -> jax.Array:
    """Thresholds after a step of sign balancing, which moves them until both children of a node have tokens.

        threshold += balance_rate * sign(visits right - visits left)

    A node that sends most tokens right gets a higher threshold, so fewer go right next time. Nodes of the
    bottom level decide nothing and stay, as do nodes with one child left.

    Args:
      routing: `threshold` [P, N]; of a pruned layer [R] and its structure.
      counts_PJ: int32 [P, 2^D], how many of the step's tokens reached each leaf.
      spec: `balance_rate` is read.

    Source: the bias rule of auxiliary-loss-free balancing (arXiv 2408.15664), applied to the two children of
    a node.
    """
    threshold = routing["threshold"]
    if isinstance(spec, PrunedSpec):
        left, right = pruned.sides(routing, counts_PJ, spec)
        forks_R = routing["child"][:, 0] != routing["child"][:, 1]
        return threshold + jnp.where(
            forks_R, spec.balance_rate * jnp.sign(right - left).astype(jnp.float32), 0.0
        )
    left, right = sides(counts_PJ)
    step_PR = spec.balance_rate * jnp.sign(right - left).astype(threshold.dtype)
    return threshold.at[:, : spec.shape.n_deciding].add(step_PR)


def check_fit(params: dict, x_TE: jax.Array, spec: TreeSpec) -> None:
    """Raises InputError unless tokens and weights are those of a layer.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      spec: the layer.
    """
    if x_TE.ndim != 2:
        raise InputError(f"x: shape {x_TE.shape} is not allowed; use [tokens, width].")
    if not jnp.issubdtype(x_TE.dtype, jnp.floating):
        raise InputError(f"x: dtype {x_TE.dtype} is not allowed; use float32 or bfloat16.")
    for name, wanted in array_shapes(spec, x_TE.shape[1]).items():
        found: Any = params
        for part in name.split("."):
            found = found.get(part) if found is not None else None
        if found is None:
            raise InputError(f"{name}: is missing; the spec and x need an array of shape {wanted}.")
        if found.shape != wanted:
            raise InputError(f"{name}: shape {found.shape} does not fit the spec and x, which need {wanted}.")
