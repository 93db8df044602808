"""Grouped execution as a loop over the blocks that exist: the form for CPUs.

The loop runs as often as there are real blocks, reads one path's weights at a
time and adds weight gradients in place, so no work is spent on padding and no
weights are copied per token. (`lax.fori_loop` with a traced bound is legal here
because the forward and the backward pass are both written out.)
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.blocks import Blocks, Tree, path_threshold
from tree_ffn.tree.routing import hidden_on_path
from tree_ffn.tree.spec import TreeSpec


def forward(tree: Tree, x_TE: jax.Array, blocks: Blocks, size: int, spec: TreeSpec):
    """Output of one tree and the pre-activations that its backward pass needs.

    Returns:
      s_TE in x's dtype; z float32 [T + size, path_units] in sorted order.
    """
    n_tokens, width = x_TE.shape
    x_sorted = _sorted_rows(x_TE, blocks, size)
    z_sorted = jnp.zeros((n_tokens + size, spec.shape.path_units), jnp.float32)
    s_sorted = jnp.zeros((n_tokens + size, width), x_TE.dtype)

    def one_block(m, carry):
        z_sorted, s_sorted = carry
        leaf, first = blocks.leaf_M[m], blocks.first_M[m]
        w_in_AE = _path_rows(tree.w_in_UE, leaf, spec).astype(x_TE.dtype)
        w_out_AE = _path_rows(tree.w_out_UE, leaf, spec).astype(x_TE.dtype)
        b_in_A = _path_rows(tree.b_in_U, leaf, spec).astype(jnp.float32)
        x_BE = jax.lax.dynamic_slice_in_dim(x_sorted, first, size)
        z_BA = jnp.einsum("be,ae->ba", x_BE, w_in_AE, preferred_element_type=jnp.float32) + b_in_A[None]
        h_BA = _hidden(z_BA, tree, leaf, spec)
        s_BE = jnp.einsum("ba,ae->be", h_BA.astype(x_TE.dtype), w_out_AE)
        # Blocks come in sorted order, so rows beyond a block's last are
        # overwritten by the next block, and the last block's are cut off below.
        z_sorted = jax.lax.dynamic_update_slice_in_dim(z_sorted, z_BA, first, axis=0)
        s_sorted = jax.lax.dynamic_update_slice_in_dim(s_sorted, s_BE, first, axis=0)
        return z_sorted, s_sorted

    z_sorted, s_sorted = jax.lax.fori_loop(0, blocks.count, one_block, (z_sorted, s_sorted))
    return _unsorted_rows(s_sorted, blocks), z_sorted


def backward(
    tree: Tree,
    x_TE: jax.Array,
    ds_TE: jax.Array,
    z_sorted: jax.Array,
    blocks: Blocks,
    size: int,
    spec: TreeSpec,
):
    """Gradients of one tree: dx_TE, dw_in_UE, db_in_U, dw_out_UE (weights' in float32)."""
    x_sorted, ds_sorted = _sorted_rows(x_TE, blocks, size), _sorted_rows(ds_TE, blocks, size)
    gradients = (
        jnp.zeros(x_sorted.shape, x_TE.dtype),
        jnp.zeros(tree.w_in_UE.shape, jnp.float32),
        jnp.zeros(tree.b_in_U.shape, jnp.float32),
        jnp.zeros(tree.w_out_UE.shape, jnp.float32),
    )

    def one_block(m, carry):
        dx_sorted, dw_in_UE, db_in_U, dw_out_UE = carry
        leaf, first = blocks.leaf_M[m], blocks.first_M[m]
        w_in_AE = _path_rows(tree.w_in_UE, leaf, spec).astype(x_TE.dtype)
        w_out_AE = _path_rows(tree.w_out_UE, leaf, spec).astype(x_TE.dtype)
        x_BE = jax.lax.dynamic_slice_in_dim(x_sorted, first, size)
        ds_BE = jax.lax.dynamic_slice_in_dim(ds_sorted, first, size)
        z_BA = jax.lax.dynamic_slice_in_dim(z_sorted, first, size)
        real_B1 = (jnp.arange(size) < blocks.rows_M[m])[:, None]
        h_BA, vjp = jax.vjp(lambda z: _hidden(z, tree, leaf, spec), z_BA)
        dh_BA = jnp.einsum("be,ae->ba", ds_BE, w_out_AE, preferred_element_type=jnp.float32)
        (dz_BA,) = vjp(dh_BA)
        h_BA = jnp.where(real_B1, h_BA, 0.0).astype(x_TE.dtype)
        dz_BA = jnp.where(real_B1, dz_BA, 0.0)
        db_in_U = _add_path_rows(db_in_U, dz_BA.sum(axis=0), leaf, spec)
        dz_BA = dz_BA.astype(x_TE.dtype)
        dx_BE = jnp.einsum("ba,ae->be", dz_BA, w_in_AE)
        dx_sorted = jax.lax.dynamic_update_slice_in_dim(dx_sorted, dx_BE, first, axis=0)
        dw_in_AE = jnp.einsum("ba,be->ae", dz_BA, x_BE, preferred_element_type=jnp.float32)
        dw_out_AE = jnp.einsum("ba,be->ae", h_BA, ds_BE, preferred_element_type=jnp.float32)
        dw_in_UE = _add_path_rows(dw_in_UE, dw_in_AE, leaf, spec)
        dw_out_UE = _add_path_rows(dw_out_UE, dw_out_AE, leaf, spec)
        return dx_sorted, dw_in_UE, db_in_U, dw_out_UE

    dx_sorted, dw_in_UE, db_in_U, dw_out_UE = jax.lax.fori_loop(0, blocks.count, one_block, gradients)
    return _unsorted_rows(dx_sorted, blocks), dw_in_UE, db_in_U, dw_out_UE


def _hidden(z_BA, tree: Tree, leaf, spec: TreeSpec):
    threshold_D = path_threshold(tree.threshold_N, leaf, spec)
    return hidden_on_path(z_BA, jnp.broadcast_to(threshold_D, (z_BA.shape[0], spec.shape.depth)), spec)


def _sorted_rows(rows_TE, blocks: Blocks, size: int):
    """Rows in sorted order, and `size` zero rows that the last block may run into."""
    rows = jnp.take(rows_TE, blocks.order_T, axis=0, mode="clip")
    return jnp.pad(rows, ((0, size), (0, 0)))


def _unsorted_rows(rows_sorted, blocks: Blocks):
    n_tokens = blocks.order_T.shape[0]
    position_T = (
        jnp.zeros(n_tokens, jnp.int32)
        .at[blocks.order_T]
        .set(jnp.arange(n_tokens, dtype=jnp.int32), unique_indices=True)
    )
    return jnp.take(rows_sorted, position_T, axis=0, mode="clip")


def _level_start(leaf, level: int, spec: TreeSpec):
    """First unit of the node that the path to `leaf` visits at `level`."""
    shape = spec.shape
    return shape.level_starts[level] + (leaf >> (shape.depth - level)) * shape.widths[level]


def _path_rows(units_U, leaf, spec: TreeSpec):
    """Rows of the units on the path to `leaf`, root first: [path_units, ...]."""
    runs = [
        jax.lax.dynamic_slice_in_dim(units_U, _level_start(leaf, level, spec), width)
        for level, width in enumerate(spec.shape.widths)
    ]
    return jnp.concatenate(runs, axis=0)


def _add_path_rows(units_U, rows_A, leaf, spec: TreeSpec):
    """Adds `rows_A` to the path's rows, a run a level, in place inside a loop."""
    for level, width in enumerate(spec.shape.widths):
        start, at = _level_start(leaf, level, spec), spec.shape.path_starts[level]
        run = jax.lax.dynamic_slice_in_dim(units_U, start, width) + rows_A[at : at + width]
        units_U = jax.lax.dynamic_update_slice_in_dim(units_U, run, start, axis=0)
    return units_U
