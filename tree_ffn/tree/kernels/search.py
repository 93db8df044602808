"""The beam of trees and the gradient of what it finds, on an NVIDIA GPU, by `search.cu`."""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.kernels import cuda

MOST_TOP_K, MOST_ROWS, MOST_BLOCKS = (
    64,
    4096,
    396,
)  # blocks of 8 warps, three on each of Hopper's multiprocessors


def in_use(n_tokens, spec) -> bool:
    """Whether a program that is traced now searches by the kernels: of trees none of whose experts is pruned.

    Args:
      n_tokens: T; of an exported batch no number.
      spec: a LeafSpec with trees.
    """
    if not cuda.in_use("search"):
        return False
    sizes = spec.top_k <= MOST_TOP_K and spec.router_rows <= MOST_ROWS
    return isinstance(n_tokens, int) and n_tokens > 0 and sizes and spec.depth > 0 and not spec.n_kept


def beam(r_TS: jax.Array, b_R: jax.Array, bias_R: jax.Array, spec) -> tuple[jax.Array, jax.Array]:
    """The K leaves that a search finds, the likeliest first, and their log p: int32 and float32 [T, K].

    Args:
      r_TS: float32 logits without biases; S is at least R and a multiple of 4.
      b_R: float32.
      bias_R: float32, what balances the load; of size 0: nothing does.
      spec: the layer.
    """
    shape = (r_TS.shape[0], spec.top_k)
    shapes = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
    ids_TK, log_p_TK = jax.ffi.ffi_call("tree_ffn_search", shapes)(
        r_TS, b_R, bias_R, **_numbers(spec), top_k=np.int64(spec.top_k)
    )
    return ids_TK, log_p_TK


def gradient(r_TS, b_R, ids_TK, d_TK, spec, dtype) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the logits and of b from those of log p: `dtype` [T, S], float32 [R].

    Args:
      r_TS: as of `beam`.
      b_R: as of `beam`.
      ids_TK: what it found.
      d_TK: float32.
      spec: the layer.
      dtype: float32 or bfloat16.
    """
    n_blocks = min(-(-r_TS.shape[0] // 8), MOST_BLOCKS)
    shapes = (
        jax.ShapeDtypeStruct(r_TS.shape, dtype),
        jax.ShapeDtypeStruct((n_blocks, b_R.size), jnp.float32),
    )
    d_TS, d_BR = jax.ffi.ffi_call("tree_ffn_search_gradient", shapes)(
        r_TS, b_R, ids_TK, d_TK, **_numbers(spec)
    )
    return d_TS, d_BR.sum(axis=0)


def _numbers(spec) -> dict[str, np.int64]:
    return {"trees": np.int64(spec.n_trees), "depth": np.int64(spec.depth)}


def probe() -> None:
    """Raises unless the kernels find what XLA finds, and its gradient."""
    from tree_ffn.tree.leaf import LeafSpec
    from tree_ffn.tree.leaf import beam as by_xla  # which imports this module

    spec = LeafSpec(n_experts=192, expert_width=1, top_k=20, n_trees=3)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    r_TS, b_R, d_TK = draw(0, 100, 192), draw(1, spec.router_rows), draw(2, 100, spec.top_k)
    found, wanted = beam(r_TS, b_R, jnp.zeros(0), spec), by_xla.of_logits({}, r_TS, b_R, spec)
    grads = gradient(r_TS, b_R, wanted[0], d_TK, spec, jnp.float32)
    wanted_grads = by_xla.gradient(r_TS, b_R, wanted[0], d_TK, spec)
    if not (found[0] == wanted[0]).all(axis=1).mean() > 0.9:  # all but near ties
        raise ArithmeticError("it does not find the leaves that XLA finds")
    for got, right in zip(grads, wanted_grads):
        if not jnp.linalg.norm(got - right) < 1e-4 * jnp.linalg.norm(right):
            raise ArithmeticError("its gradients are not those of XLA")
