"""Grouped execution as batched products over padded blocks: the form for accelerators.

All blocks run at once: their rows are gathered to [M, size, E], their paths'
weights to [M, A, E], and each projection is one batched product that the vendor
library runs near its peak. M is static, at most T / size + 2^D; rows beyond a
block's last are zero. Weight gradients are products per block, then summed over
the blocks of a node by one product with a one-hot matrix per level: nothing is
scattered.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.blocks import Blocks, Weights, path_sides, path_threshold
from tree_ffn.tree.gates import hidden_on_path
from tree_ffn.tree.layout import Layout
from tree_ffn.tree.spec import TreeSpec


def block_size(n_tokens: int, n_leaves: int) -> int:
    """Power of two next to the mean run of a leaf, within 8 and 128 (or T).

    Longer blocks waste rows on the ends of runs, shorter ones re-read a path's
    weights. A choice by reasoning: block sizes have no rows in results/ yet.
    """
    size = 1
    while size < 8 and size < n_tokens:
        size *= 2
    while size < 128 and size * n_leaves < n_tokens:
        size *= 2
    return size


def forward(weights: Weights, x_TE: jax.Array, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Sum of the trees and the pre-activations that the backward pass needs.

    Args:
      weights: of all trees, [P, ...].
      x_TE: tokens.
      blocks_P: tables of every tree, stacked [P, ...].
      size: rows of a block.
      spec: the layer.

    Returns:
      s_TE float32; z float32 [P, M, size, path_units].
    """
    layout = weights.layout(spec)
    if weights.w_in.shape[0] == 1:
        s_TE, z = _forward_tree(_only(weights), x_TE, _only(blocks_P), size, layout)
        return s_TE, z[None]

    def add_tree(sum_TE, tree_and_blocks):
        s_TE, z = _forward_tree(tree_and_blocks[0], x_TE, tree_and_blocks[1], size, layout)
        return sum_TE + s_TE, z

    return jax.lax.scan(add_tree, jnp.zeros(x_TE.shape, jnp.float32), (weights, blocks_P))


def backward(weights: Weights, x_TE, ds_TE, z, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Gradients: dx_TE, dw_in, db_in and dw_out of all trees, float32."""
    layout = weights.layout(spec)
    if weights.w_in.shape[0] == 1:
        dx_TE, *grads = _backward_tree(_only(weights), x_TE, ds_TE, z[0], _only(blocks_P), size, layout)
        return dx_TE, *(grad[None] for grad in grads)

    def add_tree(sum_TE, inputs):
        tree, blocks, z_tree = inputs
        dx_TE, *grads = _backward_tree(tree, x_TE, ds_TE, z_tree, blocks, size, layout)
        return sum_TE + dx_TE, grads

    dx_TE, grads = jax.lax.scan(add_tree, jnp.zeros(x_TE.shape, jnp.float32), (weights, blocks_P, z))
    return dx_TE, *grads


def _only(stacked):
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def _forward_tree(tree: Weights, x_TE: jax.Array, blocks: Blocks, size: int, layout: Layout):
    dtype = x_TE.dtype
    x_MBE = _block_rows(x_TE, blocks, size)
    w_in_MAE = _path_rows(tree.w_in.astype(dtype), blocks.leaf_M, layout)
    b_in_MA = _path_rows(tree.b_in.astype(jnp.float32), blocks.leaf_M, layout)
    z_MBA = jnp.einsum("mbe,mae->mba", x_MBE, w_in_MAE, preferred_element_type=jnp.float32) + b_in_MA[:, None]
    h_MBA = _hidden(z_MBA, tree, blocks, layout).astype(dtype)
    w_out_MAE = _path_rows(tree.w_out.astype(dtype), blocks.leaf_M, layout.outputs)
    s_MBE = jnp.einsum("mba,mae->mbe", h_MBA, w_out_MAE, preferred_element_type=jnp.float32)
    return _token_rows(s_MBE, blocks), z_MBA


def _backward_tree(
    tree: Weights,
    x_TE: jax.Array,
    ds_TE: jax.Array,
    z_MBA: jax.Array,
    blocks: Blocks,
    size: int,
    layout: Layout,
):
    dtype = x_TE.dtype
    x_MBE, ds_MBE = _block_rows(x_TE, blocks, size), _block_rows(ds_TE, blocks, size)
    w_out_MAE = _path_rows(tree.w_out.astype(dtype), blocks.leaf_M, layout.outputs)
    h_MBA, vjp = jax.vjp(lambda z: _hidden(z, tree, blocks, layout), z_MBA)
    dh_MBA = jnp.einsum("mbe,mae->mba", ds_MBE, w_out_MAE, preferred_element_type=jnp.float32)
    # Padding rows of ds are zero, so dh and dz are zero there too, and h times ds.
    (dz_MBA,) = vjp(dh_MBA)
    db_in_U = _sum_over_blocks(dz_MBA.sum(axis=1), blocks.leaf_M, layout)
    dz_MBA = dz_MBA.astype(dtype)
    w_in_MAE = _path_rows(tree.w_in.astype(dtype), blocks.leaf_M, layout)
    dx_MBE = jnp.einsum("mba,mae->mbe", dz_MBA, w_in_MAE, preferred_element_type=jnp.float32)
    dw_in_UE = _sum_over_blocks(jnp.einsum("mba,mbe->mae", dz_MBA, x_MBE), blocks.leaf_M, layout)
    dw_out_UE = _sum_over_blocks(
        jnp.einsum("mba,mbe->mae", h_MBA.astype(dtype), ds_MBE), blocks.leaf_M, layout.outputs
    )
    return _token_rows(dx_MBE, blocks), dw_in_UE, db_in_U, dw_out_UE


def _hidden(z_MBA, tree: Weights, blocks: Blocks, layout: Layout):
    threshold_MD = path_threshold(tree.threshold, blocks.leaf_M, layout)
    threshold_MBD = jnp.broadcast_to(threshold_MD[:, None], (*z_MBA.shape[:2], layout.spec.shape.depth))
    right_MD = path_sides(blocks.leaf_M, layout)
    right_MBD = None if right_MD is None else jnp.broadcast_to(right_MD[:, None], threshold_MBD.shape)
    return hidden_on_path(z_MBA, threshold_MBD, layout.spec, right_MBD)


def _block_rows(rows_TE, blocks: Blocks, size: int):
    """Rows of every block, zero beyond its last: [M, size, E]."""
    offset_B = jnp.arange(size, dtype=jnp.int32)
    position_MB = blocks.first_M[:, None] + offset_B[None]
    token_MB = jnp.take(blocks.order_T, position_MB, mode="clip")
    rows_MBE = jnp.take(rows_TE, token_MB, axis=0, mode="clip")
    real_MB = offset_B[None] < blocks.rows_M[:, None]
    return jnp.where(real_MB[..., None], rows_MBE, jnp.zeros((), rows_TE.dtype))


def _token_rows(rows_MBE, blocks: Blocks):
    return jnp.take(rows_MBE.reshape(-1, rows_MBE.shape[-1]), blocks.slot_T, axis=0, mode="clip")


def _path_rows(units_U, leaf_M, layout: Layout):
    """Rows of the units on every block's path, root first: [M, path_units, ...]."""
    runs = []
    for level, width in layout.levels:
        start, stop = layout.unit_starts[level], layout.unit_starts[level + 1]
        nodes_NW = units_U[start:stop].reshape(-1, width, *units_U.shape[1:])
        runs.append(jnp.take(nodes_NW, layout.ancestor(level, leaf_M), axis=0, mode="clip"))
    return jnp.concatenate(runs, axis=1)


def _sum_over_blocks(rows_MA, leaf_M, layout: Layout):
    """Sum of the blocks' path rows [M, path_units, ...] into the tree's units: float32 [U, ...]."""
    rest = rows_MA.shape[2:]
    levels = []
    for level, width in layout.levels:
        at = layout.path_starts[level]
        rows = rows_MA[:, at : at + width].reshape(rows_MA.shape[0], -1)
        nodes_N = jnp.arange(layout.nodes[level], dtype=leaf_M.dtype)
        one_hot_NM = (nodes_N[:, None] == layout.ancestor(level, leaf_M)[None]).astype(rows.dtype)
        summed = jnp.einsum("nm,mr->nr", one_hot_NM, rows, preferred_element_type=jnp.float32)
        levels.append(summed.reshape(-1, *rest))
    return jnp.concatenate(levels, axis=0)
