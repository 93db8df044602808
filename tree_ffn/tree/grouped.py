"""The implementation for many tokens: pairs of a token and an expert, sorted by expert.

Sums of a leaf layer's experts in bfloat16 and their gradients are those of `kernels.experts` where they are
compiled for an NVIDIA GPU, after `make kernels`; elsewhere, in exported programs and of other layers they are
XLA's. The kernels have first derivatives in reverse mode alone.
"""

import functools

import jax
import jax.numpy as jnp

from tree_ffn.tree import rows
from tree_ffn.tree.kernels import cuda, experts
from tree_ffn.tree.meshes import platform
from tree_ffn.tree.tiles import by_tiles

BLOCK = 64  # pairs of a token and an expert that are multiplied at a time
UNITS = ("w_in", "b_in", "w_out")


def grouped(params, x_TE, ids_TK, gates_TK, spec) -> jax.Array:
    """Pairs of a token and an expert, sorted by expert and multiplied many at a time. For many tokens.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      ids_TK: int32, the chosen experts.
      gates_TK: float32, their gates.
      spec: the layer.
    """
    if platform() == "tpu" and hasattr(spec, "row"):  # experts with units of their own
        return by_tiles(params, x_TE, ids_TK, gates_TK, spec)
    if not by_kernels(params, x_TE, ids_TK.shape[1], spec):
        return _by_blocks(params, x_TE, ids_TK, gates_TK, spec)
    return _sum(spec, x_TE, *(params[name] for name in UNITS), ids_TK, gates_TK)


def by_kernels(params, x_TE, top_k: int, spec) -> bool:
    """Whether a GPU's kernels compute `grouped`: built, and for tokens and layers that they are made for.

    Args:
      params: the layer's arrays.
      x_TE: tokens; only their shape and dtype count.
      top_k: K.
      spec: the layer.
    """
    if not cuda.in_use("experts"):
        return False
    shape = params["w_in"].shape
    owns = len(shape) == 3 and shape[0] == spec.n_experts  # an expert is units of its own: [X, W, E]
    return owns and experts.fit(x_TE, top_k, shape)


def _by_blocks(params, x_TE, ids_TK, gates_TK, spec) -> jax.Array:
    """By XLA: a block is `BLOCK` pairs of one expert, whose last block may be filled up.

    There are T K / BLOCK + X blocks at most.
    """
    n_tokens, top_k = ids_TK.shape
    if isinstance(n_tokens, int) and not n_tokens:
        return x_TE
    pair_MB, slot_TK, expert_M, is_used_MB = _blocks(ids_TK, spec.n_experts)
    w_in, b_in, w_out = flat(params, x_TE.shape[1])
    x_MBE = jnp.where(is_used_MB[..., None], x_TE[pair_MB // top_k], 0)
    s_MBE = jnp.zeros(x_MBE.shape, jnp.float32)
    for start_Mn, width in spec.runs(params, expert_M):
        unit = lambda array, start_Mn=start_Mn, width=width: _merged(rows.rows(array, start_Mn, width))
        w_MUE, v_MUE = (unit(array).astype(x_TE.dtype) for array in (w_in, w_out))
        z_MBU = jnp.einsum("mbe,mue->mbu", x_MBE, w_MUE, preferred_element_type=jnp.float32)
        h_MBU = spec.act(z_MBU + _float32(unit(b_in))[:, None]).astype(x_TE.dtype)
        s_MBE += jnp.einsum("mbu,mue->mbe", h_MBU, v_MUE, preferred_element_type=jnp.float32)
    s_TKE = s_MBE.reshape(-1, x_TE.shape[1]).at[slot_TK].get(mode="promise_in_bounds", unique_indices=True)
    return jnp.einsum("tke,tk->te", s_TKE, gates_TK).astype(x_TE.dtype)


def _blocks(ids_TK: jax.Array, n_experts: int):
    """Where pairs stand, sorted by expert and filled up to whole blocks.

    Returns:
      pair_MB, the pair (t K + k) of every place; slot_TK, the place of every pair; expert_M, of every block;
      is_used_MB, whether there is a pair at a place.
    """
    n_pairs, ids_N = ids_TK.size, ids_TK.reshape(-1)
    n_blocks = n_pairs // BLOCK + n_experts
    if isinstance(n_pairs, int):  # an exported batch has no number
        n_blocks = min(n_pairs, n_blocks)
    order_N = jnp.argsort(ids_N, stable=True).astype(jnp.int32)
    counts_X = jnp.bincount(ids_N, length=n_experts).astype(jnp.int32)
    ends_X, blocks_X = jnp.cumsum(counts_X), jnp.cumsum((counts_X + BLOCK - 1) // BLOCK)
    block_M = jnp.arange(n_blocks, dtype=jnp.int32)
    expert_M = jnp.searchsorted(blocks_X, block_M, side="right", method="compare_all").astype(jnp.int32)
    expert_M = jnp.minimum(expert_M, n_experts - 1)
    first_X = (blocks_X - (counts_X + BLOCK - 1) // BLOCK) * BLOCK  # place of an expert's first pair
    rank_N = jnp.arange(n_pairs, dtype=jnp.int32) - (ends_X - counts_X)[ids_N[order_N]]
    place_N = first_X[ids_N[order_N]] + rank_N
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    pair_MB = jnp.zeros(n_blocks * BLOCK, jnp.int32).at[place_N].set(order_N, **options)
    is_used_MB = jnp.zeros(n_blocks * BLOCK, bool).at[place_N].set(True, **options)
    slot_TK = jnp.zeros(n_pairs, jnp.int32).at[order_N].set(place_N, **options).reshape(ids_TK.shape)
    return pair_MB.reshape(-1, BLOCK), slot_TK, expert_M, is_used_MB.reshape(-1, BLOCK)


def flat(params, width: int):
    """Units one after the other: w_in [F, E], b_in [F], w_out [F, E].

    Args:
      params: the layer's arrays.
      width: E.
    """
    return params["w_in"].reshape(-1, width), params["b_in"].reshape(-1), params["w_out"].reshape(-1, width)


def _merged(array_MnW: jax.Array) -> jax.Array:
    return array_MnW.reshape(array_MnW.shape[0], -1, *array_MnW.shape[3:])


def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(spec, *arrays):
    return _summed.bind(*arrays, spec=spec)[0]


def _sum_forward(spec, *arrays):
    y_TE, *saved = _summed_saving.bind(*arrays, spec=spec)
    return y_TE, (arrays, saved)


def _sum_backward(spec, kept, dy_TE):
    arrays, saved = kept
    *grads, d_gates_TK = _gradients.bind(dy_TE, *arrays, *saved, spec=spec)
    return (*grads, None, d_gates_TK)


_sum.defvjp(_sum_forward, _sum_backward)


def _sum_by_xla(x_TE, w_in, b_in, w_out, ids_TK, gates_TK, spec):
    return (_by_blocks({"w_in": w_in, "b_in": b_in, "w_out": w_out}, x_TE, ids_TK, gates_TK, spec),)


def _saving_by_xla(*arrays, spec):
    """What XLA needs no kernel's numbers for; it computes y again in the backward pass."""
    saved = jax.tree.leaves(experts.saved_shapes(arrays[4], arrays[1].shape, experts.siblings(spec)))
    return _sum_by_xla(*arrays, spec=spec) + tuple(jnp.zeros(one.shape, one.dtype) for one in saved)


def _gradients_by_xla(dy_TE, x_TE, w_in, b_in, w_out, ids_TK, gates_TK, *saved, spec):
    y = lambda x_TE, w_in, b_in, w_out, gates_TK: _sum_by_xla(
        x_TE, w_in, b_in, w_out, ids_TK, gates_TK, spec
    )[0]
    return jax.vjp(y, x_TE, w_in, b_in, w_out, gates_TK)[1](dy_TE)


def _sum_by_kernel(*arrays, spec):
    return (experts.forward(*arrays, act=spec.act, n_siblings=experts.siblings(spec))[0],)


def _saving_by_kernel(*arrays, spec):
    y_TE, saved = experts.forward(*arrays, act=spec.act, n_siblings=experts.siblings(spec))
    return (y_TE, *jax.tree.leaves(saved))


def _gradients_by_kernel(dy_TE, x_TE, w_in, b_in, w_out, ids_TK, gates_TK, *saved, spec):
    n_siblings = experts.siblings(spec)
    shapes = experts.saved_shapes(ids_TK, w_in.shape, n_siblings)
    saved = jax.tree.unflatten(jax.tree.structure(shapes), saved)
    arrays = (dy_TE, x_TE, w_in, b_in, w_out, ids_TK, gates_TK)
    return experts.backward(*arrays, saved, spec.act, n_siblings)


_summed = rows.by_kernel_on("cuda", "tree_ffn_experts", _sum_by_xla, _sum_by_kernel)
_summed_saving = rows.by_kernel_on("cuda", "tree_ffn_experts_saving", _saving_by_xla, _saving_by_kernel)
_gradients = rows.by_kernel_on("cuda", "tree_ffn_experts_gradients", _gradients_by_xla, _gradients_by_kernel)
