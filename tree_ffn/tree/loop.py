"""Grouped execution as a loop over the blocks that exist: the form for CPUs.

One loop runs over the real blocks of all trees: it reads a block's tokens and
its path's weights, and adds weight gradients in place, so nothing is padded and
no weights are copied per token or per tree. It is one flat loop because XLA
updates a loop's carry in place, but copies it in every turn of a nested one.
(`lax.fori_loop` with a traced bound is legal here because the forward and the
backward pass are both written out.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tree_ffn.tree.blocks import Blocks, Weights, path_threshold
from tree_ffn.tree.routing import hidden_on_path
from tree_ffn.tree.spec import TreeSpec


def forward(weights: Weights, x_TE: jax.Array, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Sum of the trees and the pre-activations that the backward pass needs.

    Args:
      weights: of all trees, [P, ...].
      x_TE: tokens.
      blocks_P: tables of every tree, stacked [P, ...].
      size: rows of a block.
      spec: the layer.

    Returns:
      s_TE in x's dtype; z float32 [P * T + size, path_units], each tree's tokens in sorted order.
    """
    dtype = x_TE.dtype
    work = _work_list(blocks_P, size)
    x = _sorted_rows(x_TE, work)

    def one_block(i, carry):
        z, s = carry
        p, leaf, row = work.tree[i], work.leaf[i], work.row[i]
        x_BE = jax.lax.dynamic_slice_in_dim(x, row, size)
        z_BA = _matmul("be,ae->ba", x_BE, _path(weights.w_in, p, leaf, spec))
        z_BA += _path(weights.b_in, p, leaf, spec).astype(jnp.float32)[None]
        h_BA = hidden_on_path(z_BA, _thresholds(weights, p, leaf, size, spec), spec)
        s_BE = _matmul("ba,ae->be", h_BA.astype(dtype), _path(weights.w_out, p, leaf, spec)).astype(dtype)
        # Blocks come in sorted order, so rows beyond a block's last are
        # overwritten by the next block, and the last block's are never read.
        z = jax.lax.dynamic_update_slice(z, z_BA, (row, 0))
        return z, jax.lax.dynamic_update_slice(s, s_BE, (row, 0))

    n_rows = spec.shape.n_trees * x_TE.shape[0] + size
    z = jnp.zeros((n_rows, spec.shape.path_units), jnp.float32)
    z, s = jax.lax.fori_loop(0, work.count, one_block, (z, jnp.zeros((n_rows, x_TE.shape[1]), dtype)))
    return _sum_of_trees(s, blocks_P), z


def backward(weights: Weights, x_TE, ds_TE, z, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Gradients: dx_TE in x's dtype, and float32 dw_in, db_in and dw_out of all trees."""
    dtype = x_TE.dtype
    work = _work_list(blocks_P, size)
    x, ds = _sorted_rows(x_TE, work), _sorted_rows(ds_TE, work)

    def one_block(i, carry):
        dx, dw_in, db_in, dw_out = carry
        p, leaf, row = work.tree[i], work.leaf[i], work.row[i]
        x_BE = jax.lax.dynamic_slice_in_dim(x, row, size)
        ds_BE = jax.lax.dynamic_slice_in_dim(ds, row, size)
        z_BA = jax.lax.dynamic_slice_in_dim(z, row, size)
        threshold = _thresholds(weights, p, leaf, size, spec)
        h_BA, vjp = jax.vjp(lambda z_BA: hidden_on_path(z_BA, threshold, spec), z_BA)
        (dz_BA,) = vjp(_matmul("be,ae->ba", ds_BE, _path(weights.w_out, p, leaf, spec)))
        real_B1 = (jnp.arange(size) < work.n_rows[i])[:, None]
        h_BA = jnp.where(real_B1, h_BA, 0.0).astype(dtype)
        dz_BA = jnp.where(real_B1, dz_BA, 0.0)
        db_in = _add_path(db_in, dz_BA.sum(axis=0), p, leaf, spec)
        dz_BA = dz_BA.astype(dtype)
        dx_BE = _matmul("ba,ae->be", dz_BA, _path(weights.w_in, p, leaf, spec)).astype(dtype)
        dw_in = _add_path(dw_in, _matmul("ba,be->ae", dz_BA, x_BE), p, leaf, spec)
        dw_out = _add_path(dw_out, _matmul("ba,be->ae", h_BA, ds_BE), p, leaf, spec)
        return jax.lax.dynamic_update_slice(dx, dx_BE, (row, 0)), dw_in, db_in, dw_out

    dx = jnp.zeros((z.shape[0], x_TE.shape[1]), dtype)
    grads = (jnp.zeros(w.shape, jnp.float32) for w in (weights.w_in, weights.b_in, weights.w_out))
    dx, *grads = jax.lax.fori_loop(0, work.count, one_block, (dx, *grads))
    return _sum_of_trees(dx, blocks_P), *grads


class _Work(NamedTuple):
    """The real blocks of all trees, one after the other; `count` of the K entries are used."""

    tree: jax.Array  # [K]
    leaf: jax.Array  # [K]
    row: jax.Array  # [K] first row in the arrays of all trees, p * T + position
    n_rows: jax.Array  # [K] rows in use
    token: jax.Array  # [P * T + size] token of every row
    count: jax.Array


def _work_list(blocks_P: Blocks, size: int) -> _Work:
    n_trees, most = blocks_P.leaf_M.shape
    n_tokens = blocks_P.order_T.shape[1]
    ends = jnp.cumsum(blocks_P.count, dtype=jnp.int32)
    index = jnp.arange(n_trees * most, dtype=jnp.int32)
    tree = jnp.minimum(jnp.searchsorted(ends, index, side="right"), n_trees - 1).astype(jnp.int32)
    block = index - (ends - blocks_P.count)[tree]
    row = tree * n_tokens + blocks_P.first_M[tree, block]
    token = jnp.pad(blocks_P.order_T.reshape(-1), (0, size))
    return _Work(tree, blocks_P.leaf_M[tree, block], row, blocks_P.rows_M[tree, block], token, ends[-1])


def _sorted_rows(rows_TE, work: _Work):
    """Rows of all trees in sorted order: P copies of the tokens, read in runs by the loop."""
    return jnp.take(rows_TE, work.token, axis=0, mode="clip")


def _sum_of_trees(rows, blocks_P: Blocks):
    """[P * T + size, E] in every tree's sorted order -> [T, E] in the order of the tokens."""
    n_trees, n_tokens = blocks_P.position_T.shape
    if n_trees == 1:
        return jnp.take(rows, blocks_P.position_T[0], axis=0, mode="clip")

    def add_tree(p, sum_TE):
        row_T = p * n_tokens + blocks_P.position_T[p]
        return sum_TE + jnp.take(rows, row_T, axis=0, mode="clip").astype(jnp.float32)

    sum_TE = jax.lax.fori_loop(0, n_trees, add_tree, jnp.zeros((n_tokens, rows.shape[1]), jnp.float32))
    return sum_TE.astype(rows.dtype)


def _matmul(subscripts: str, a, b):
    """Product with a float32 result; the weights `b` come in their own dtype."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _thresholds(weights: Weights, p, leaf, size: int, spec: TreeSpec):
    threshold_D = path_threshold(weights.threshold[p], leaf, spec)
    return jnp.broadcast_to(threshold_D, (size, spec.shape.depth))


def _runs(p, leaf, spec: TreeSpec):
    """Where the path to `leaf` of tree p has its units: (level, index of the first, width)."""
    shape = spec.shape
    for level, width in enumerate(shape.widths):
        first = shape.level_starts[level] + (leaf >> (shape.depth - level)) * width
        yield level, (p, first), width


def _path(units_PU, p, leaf, spec: TreeSpec):
    """Rows of the units on the path to `leaf` of tree p, root first: [path_units, ...]."""
    rest = units_PU.shape[2:]
    zeros = (0,) * len(rest)
    runs = [
        jax.lax.dynamic_slice(units_PU, (*start, *zeros), (1, width, *rest))[0]
        for _, start, width in _runs(p, leaf, spec)
    ]
    return jnp.concatenate(runs, axis=0)


def _add_path(units_PU, rows_A, p, leaf, spec: TreeSpec):
    """Adds `rows_A` to the path's rows, a run a level, in place inside a loop."""
    zeros = (0,) * (units_PU.ndim - 2)
    for level, start, width in _runs(p, leaf, spec):
        rows = rows_A[spec.shape.path_starts[level] :][:width]
        here = jax.lax.dynamic_slice(units_PU, (*start, *zeros), (1, *rows.shape))
        units_PU = jax.lax.dynamic_update_slice(units_PU, here + rows[None], (*start, *zeros))
    return units_PU
