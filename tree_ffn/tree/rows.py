"""Runs of rows that every token names, read where they lie.

On a CPU, after `make kernels`, by the functions of `kernels`; elsewhere, in other dtypes than float32, and in
programs that are exported, XLA gathers them first. Differentiated, they are always XLA's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tree_ffn.tree import kernels
from tree_ffn.tree.kernels.primitives import by_kernel_on
from tree_ffn.tree.meshes import platform


def rows(array: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """array[start : start + width] for every start: [..., width, rest of array's shape]. Starts are in range.

    Args:
      array: [N, ...].
      start: int32 [...], the first of each run.
      width: length of all runs.

    Example:
      >>> rows(jnp.arange(6), jnp.array([[0], [3]]), 2).tolist()
      [[[0, 1]], [[3, 4]]]
    """
    index = start[..., None] + jnp.arange(width, dtype=start.dtype).reshape(*[1] * start.ndim, width)
    return array.at[index].get(mode="promise_in_bounds")


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def dots(x_TE: jax.Array, rows_FE: jax.Array, start_TK: jax.Array, width: int) -> jax.Array:
    """Products of each token with runs of rows: float32 [T, K, width].

        z[t, k, w] = <x[t], rows[start[t, k] + w]>

    Args:
      x_TE: tokens.
      rows_FE: of any dtype; products are in x's.
      start_TK: int32, in range.
      width: rows of a run.
    """
    if in_place(x_TE.dtype, rows_FE.dtype):
        return _dots_in_place.bind(x_TE, rows_FE, start_TK, width=width)[0]
    return _dots(x_TE, rows_FE, start_TK, width)


@dots.defjvp
def _dots_jvp(width, primals, tangents):
    x_TE, rows_FE, start_TK = primals
    return jax.jvp(lambda x, w: _dots(x, w, start_TK, width), (x_TE, rows_FE), tangents[:2])


def _dots(x_TE, rows_FE, start_TK, width: int):
    w_TKWE = rows(rows_FE, start_TK, width).astype(x_TE.dtype)
    return jnp.einsum("te,tkwe->tkw", x_TE, w_TKWE, preferred_element_type=jnp.float32)


@jax.custom_jvp
def sums(h_TKW: jax.Array, rows_FE: jax.Array, start_TK: jax.Array) -> jax.Array:
    """Sums of runs of rows by weights of each token: float32 [T, E].

    s[t] = sum_k sum_w h[t, k, w] rows[start[t, k] + w]

    Args:
      h_TKW: weights of the rows of every run.
      rows_FE: the rows.
      start_TK: int32, the first of each run.
    """
    if in_place(h_TKW.dtype, rows_FE.dtype):
        return _sums_in_place.bind(h_TKW, rows_FE, start_TK)[0]
    return _sums(h_TKW, rows_FE, start_TK)


@sums.defjvp
def _sums_jvp(primals, tangents):
    h_TKW, rows_FE, start_TK = primals
    return jax.jvp(lambda h, w: _sums(h, w, start_TK), (h_TKW, rows_FE), tangents[:2])


def _sums(h_TKW, rows_FE, start_TK):
    w_TKWE = rows(rows_FE, start_TK, h_TKW.shape[-1]).astype(h_TKW.dtype)
    return jnp.einsum("tkw,tkwe->te", h_TKW, w_TKWE, preferred_element_type=jnp.float32)


def in_place(*dtypes) -> bool:
    """Whether rows and numbers of these dtypes are read where they lie: on a CPU, after `make kernels`."""
    on_cpu = platform() == "cpu" and kernels.is_loaded()
    return on_cpu and all(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)


def _alone(f: Callable) -> Callable:
    """A function with one result as one to a tuple."""
    return lambda *args, **static: (f(*args, **static),)


_dots_in_place = by_kernel_on("cpu", "tree_ffn_dots", _alone(_dots), _alone(kernels.dots))
_sums_in_place = by_kernel_on("cpu", "tree_ffn_sums", _alone(_sums), _alone(kernels.sums))
