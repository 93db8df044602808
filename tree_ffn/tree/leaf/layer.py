"""The leaf layer whole: its first weights, its output, and what balances its load."""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.combine import combine, fastest
from tree_ffn.tree.info import Info
from tree_ffn.tree.kernels import decode
from tree_ffn.tree.kernels.primitives import by_kernel_on
from tree_ffn.tree.leaf import pruned
from tree_ffn.tree.leaf.route import route
from tree_ffn.tree.leaf.routers import ROUTERS
from tree_ffn.tree.leaf.spec import LeafSpec
from tree_ffn.tree.meshes import partitioned
from tree_ffn.tree.undifferentiable import undifferentiable
from tree_ffn.tree.usage import by_level, sides

_UNTOLD = (
    "done: is missing in the training of a layer with a dense start; give the share of the training that is "
    "over to FFN (or leak=spec.leak_at(done) to leaf_ffn), or use spec.after_start where the start is over."
)


def init_params(
    key, spec: LeafSpec, width: int, w_in_scale=1.0, w_out_scale=1.0, param_dtype=jnp.float32
) -> dict:
    """Initial weights of a leaf layer: normal, biases 0.

        std(w_in) = std(w_router) = w_in_scale / sqrt(E),   std(w_out) = w_out_scale / sqrt(A)

    Args:
      key: random key.
      spec: the layer.
      width: E, of tokens.
      w_in_scale: of w_in and of the router.
      w_out_scale: of w_out.
      param_dtype: of what is trained.

    Returns:
      {w_in [X,W,E], b_in [X,W], w_out [X,W,E], b_out [E]}, X the experts kept, and what `route` reads.
    """
    key_router, key_in, key_out = jax.random.split(key, 3)
    units = (spec.kept_experts, spec.expert_width)
    normal = lambda key, *shape: jax.random.normal(key, (*shape, width), param_dtype)
    scale_in, scale_out = w_in_scale / width**0.5, w_out_scale / spec.active_units**0.5
    params = {
        "w_in": normal(key_in, *units) * scale_in,
        "b_in": jnp.zeros(units, param_dtype),
        "w_out": normal(key_out, *units) * scale_out,
        "b_out": jnp.zeros((width,), param_dtype),
    }
    if ROUTERS[spec.router].by_id:
        return params | {"salt": jax.random.randint(key_router, (), 0, 2**31 - 1, jnp.int32)}
    w_router = normal(key_router, spec.router_rows) * scale_in
    params |= {"w_router": w_router} if ROUTERS[spec.router].trained else {"router": {"w": w_router}}
    if "b_router" in spec.router_params:
        params |= {"b_router": jnp.zeros((spec.router_rows,), param_dtype)}
    if spec.n_kept:
        params |= {"kept_row": jnp.asarray(pruned.kept_row(np.arange(spec.n_experts) < spec.n_kept))}
    if spec.balance_rate:
        params |= {"selection_bias": jnp.zeros((spec.balanced,), jnp.float32)}
    return params


def leaf_ffn(
    params: dict,
    x_TE: jax.Array,
    spec: LeafSpec,
    implementation: str | None = None,
    token_T: jax.Array | None = None,
    leak: jax.Array | None = None,
) -> tuple[jax.Array, Info]:
    """The leaf layer: `combine(route(x))` + b_out, and the chosen experts.

    Args:
      params: as `init_params` gives them.
      x_TE: tokens, float32 or bfloat16.
      spec: the layer.
      implementation: a name of `IMPLEMENTATIONS`; None: the fastest.
      token_T: int32 ids of the tokens, which router `hash` reads.
      leak: float32 scalar of a dense start, `spec.leak_at(done)`; None: at inference, or where there is none.

    Returns:
      y_TE of x's dtype, Info(ids int32 [T, K]).

    Raises:
      InputError: a layer with a dense start is differentiated and not told how much it leaks.

    Example:
      >>> spec = LeafSpec(n_experts=8, expert_width=2, top_k=3)
      >>> params = init_params(jax.random.key(0), spec, width=4)
      >>> layer = jax.jit(leaf_ffn, static_argnames="spec")
      >>> y, info = layer(params, jnp.ones((5, 4)), spec)
      >>> y.shape, info.leaf_TP.shape
      ((5, 4), (5, 3))
    """

    def layer(params, x_TE, token_T, leak):
        if leak is None and _is_decoded(params, x_TE, spec, implementation):
            s_TE, ids_TK = _decoded.bind(x_TE, *(params[name] for name in decode.ARRAYS), spec=spec)
        else:
            s_TE, ids_TK = _routed(params, x_TE, spec, implementation, token_T, leak)
        return s_TE + params["b_out"].astype(x_TE.dtype)[None], Info(ids_TK)

    return partitioned(layer, x_TE)(params, x_TE, token_T, leak)


def _routed(params, x_TE, spec: LeafSpec, implementation, token_T=None, leak=None):
    """The sum of the chosen experts, and which they are."""
    ids_TK, gates_TK = route(params, x_TE, spec, token_T)
    if leak is None and spec.dense_start:
        gates_TK = undifferentiable(gates_TK, x_TE, _UNTOLD)
    return combine(params, x_TE, ids_TK, gates_TK, spec, implementation, leak), ids_TK


def _is_decoded(params, x_TE, spec: LeafSpec, implementation) -> bool:
    """Whether a GPU's kernels compute both halves at once: `gather` is asked for, or the fastest."""
    if not decode.in_use(params, x_TE, spec):
        return False
    return (implementation or fastest(params, x_TE, spec)) == "gather"


_decoded = by_kernel_on(
    "cuda",
    "tree_ffn_decode",
    lambda x_TE, *arrays, spec: _routed(dict(zip(decode.ARRAYS, arrays)), x_TE, spec, "gather"),
    decode.layer,
)


def balance_update(routing: dict, counts_PJ: jax.Array, spec: LeafSpec) -> jax.Array:
    """selection_bias after a step: what is balanced moves by `balance_rate` against its load.

        flat:   bias[j] += rate sign(mean load - load[j])
        trees:  bias[n] += rate sign(load left of n - load right of n)

    Of a pruned layer the rows of experts that are gone stay, as do those of nodes with one side left.

    Args:
      routing: `selection_bias`; of a pruned layer `kept_row` too.
      counts_PJ: int32 [1, X], how many of the step's tokens took each expert.
      spec: the layer.

    Source: Wang et al. 2024 (arXiv 2408.15664) for flat routers; of trees, the same at every decision.
    """
    bias_R = routing["selection_bias"]
    load_X = counts_PJ[0]
    is_there_X = routing["kept_row"] >= 0 if spec.n_kept else jnp.ones(spec.n_experts, bool)
    if not ROUTERS[spec.router].trees:
        load_X = load_X.astype(jnp.float32)
        lean_X = jnp.sign(load_X.sum() / spec.kept_experts - load_X)
        return bias_R + spec.balance_rate * jnp.where(is_there_X, lean_X, 0.0)
    left_PN, right_PN = sides(load_X.reshape(spec.n_trees, -1))
    there_left_PN, there_right_PN = sides(is_there_X.reshape(spec.n_trees, -1).astype(jnp.int32))
    both_PN = (there_left_PN > 0) & (there_right_PN > 0)
    lean_PN = jnp.where(both_PN, jnp.sign(left_PN - right_PN), 0).astype(jnp.float32)
    # From tree by tree to the order of the rows: level by level, in each tree by tree.
    return bias_R + spec.balance_rate * jnp.concatenate([level.reshape(-1) for level in by_level(lean_PN)])
