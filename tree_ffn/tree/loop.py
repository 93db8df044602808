"""Grouped execution as a loop over the blocks that exist: the form for CPUs.

The loop runs as often as there are real blocks, reads one path's weights at a
time and adds weight gradients in place, so no work is spent on padding and no
weights are copied per token or per tree. (`lax.fori_loop` with a traced bound
is legal here because the forward and the backward pass are both written out.)
"""

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
      s_TE in x's dtype; z float32 [P, T + size, path_units], tokens in sorted order.
    """
    (n_tokens, width), dtype = x_TE.shape, x_TE.dtype

    def one_tree(p, carry):
        sum_TE, z = carry
        blocks = _tree_of(blocks_P, p)
        x_sorted = _sorted_rows(x_TE, blocks, size)

        def one_block(m, carry):
            z, s_sorted = carry
            leaf, first = blocks.leaf_M[m], blocks.first_M[m]
            z_BA = _matmul("be,ae->ba", _block(x_sorted, first, size), _path(weights.w_in, p, leaf, spec))
            z_BA += _path(weights.b_in, p, leaf, spec).astype(jnp.float32)[None]
            h_BA = hidden_on_path(z_BA, _thresholds(weights, p, leaf, size, spec), spec)
            s_BE = _matmul("ba,ae->be", h_BA.astype(dtype), _path(weights.w_out, p, leaf, spec)).astype(dtype)
            # Blocks come in sorted order, so rows beyond a block's last are
            # overwritten by the next block, and the last block's are cut off.
            z = jax.lax.dynamic_update_slice(z, z_BA[None], (p, first, 0))
            return z, jax.lax.dynamic_update_slice(s_sorted, s_BE, (first, 0))

        z, s_sorted = jax.lax.fori_loop(0, blocks.count, one_block, (z, jnp.zeros_like(x_sorted)))
        return sum_TE + _token_rows(s_sorted, blocks).astype(jnp.float32), z

    z = jnp.zeros((spec.shape.n_trees, n_tokens + size, spec.shape.path_units), jnp.float32)
    sum_TE, z = _for_trees(spec, one_tree, (jnp.zeros((n_tokens, width), jnp.float32), z))
    return sum_TE.astype(dtype), z


def backward(weights: Weights, x_TE, ds_TE, z, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Gradients: dx_TE in x's dtype, and float32 dw_in, db_in and dw_out of all trees."""
    dtype = x_TE.dtype

    def one_tree(p, carry):
        dx_TE, *weight_grads = carry
        blocks = _tree_of(blocks_P, p)
        x_sorted, ds_sorted = _sorted_rows(x_TE, blocks, size), _sorted_rows(ds_TE, blocks, size)

        def one_block(m, carry):
            dx_sorted, dw_in, db_in, dw_out = carry
            leaf, first = blocks.leaf_M[m], blocks.first_M[m]
            x_BE, ds_BE = _block(x_sorted, first, size), _block(ds_sorted, first, size)
            z_BA = jax.lax.dynamic_slice(z, (p, first, 0), (1, size, spec.shape.path_units))[0]
            threshold = _thresholds(weights, p, leaf, size, spec)
            h_BA, vjp = jax.vjp(lambda z_BA: hidden_on_path(z_BA, threshold, spec), z_BA)
            (dz_BA,) = vjp(_matmul("be,ae->ba", ds_BE, _path(weights.w_out, p, leaf, spec)))
            real_B1 = (jnp.arange(size) < blocks.rows_M[m])[:, None]
            h_BA = jnp.where(real_B1, h_BA, 0.0).astype(dtype)
            dz_BA = jnp.where(real_B1, dz_BA, 0.0)
            db_in = _add_path(db_in, dz_BA.sum(axis=0), p, leaf, spec)
            dz_BA = dz_BA.astype(dtype)
            dx_BE = _matmul("ba,ae->be", dz_BA, _path(weights.w_in, p, leaf, spec)).astype(dtype)
            dx_sorted = jax.lax.dynamic_update_slice(dx_sorted, dx_BE, (first, 0))
            dw_in = _add_path(dw_in, _matmul("ba,be->ae", dz_BA, x_BE), p, leaf, spec)
            dw_out = _add_path(dw_out, _matmul("ba,be->ae", h_BA, ds_BE), p, leaf, spec)
            return dx_sorted, dw_in, db_in, dw_out

        carry = (jnp.zeros_like(x_sorted), *weight_grads)
        dx_sorted, *weight_grads = jax.lax.fori_loop(0, blocks.count, one_block, carry)
        return dx_TE + _token_rows(dx_sorted, blocks).astype(jnp.float32), *weight_grads

    shapes = (x_TE.shape, weights.w_in.shape, weights.b_in.shape, weights.w_out.shape)
    dx_TE, *weight_grads = _for_trees(spec, one_tree, tuple(jnp.zeros(s, jnp.float32) for s in shapes))
    return dx_TE.astype(dtype), *weight_grads


def _for_trees(spec: TreeSpec, one_tree, carry):
    if spec.shape.n_trees == 1:
        return one_tree(0, carry)
    return jax.lax.fori_loop(0, spec.shape.n_trees, one_tree, carry)


def _matmul(subscripts: str, a, b):
    """Product with a float32 result; the weights `b` come in their own dtype."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _thresholds(weights: Weights, p, leaf, size: int, spec: TreeSpec):
    threshold_D = path_threshold(weights.threshold[p], leaf, spec)
    return jnp.broadcast_to(threshold_D, (size, spec.shape.depth))


def _tree_of(blocks_P: Blocks, p) -> Blocks:
    return jax.tree.map(lambda table: table[p], blocks_P)


def _block(rows_sorted, first, size: int):
    return jax.lax.dynamic_slice_in_dim(rows_sorted, first, size)


def _sorted_rows(rows_TE, blocks: Blocks, size: int):
    """Rows in sorted order, and `size` zero rows that the last block may run into."""
    rows = jnp.take(rows_TE, blocks.order_T, axis=0, mode="clip")
    return jnp.pad(rows, ((0, size), (0, 0)))


def _token_rows(rows_sorted, blocks: Blocks):
    return jnp.take(rows_sorted, blocks.position_T, axis=0, mode="clip")


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
