"""Grouped execution as loops over the blocks that exist: the form for CPUs.

A loop runs over the real blocks of all trees: it reads a block's rows and its
path's weights, multiplies them, and writes the rows or adds the weight
gradients in place, so nothing is padded and no weights are copied per token or
per tree. A loop's body is one or two products and the copies around them: what
is elementwise (activations, gates) happens between the loops, for all rows at
once, because inside a loop every small operation of every block waits for the
one before it. Each loop is a flat one because XLA updates a loop's carry in place,
but copies it in every turn of a nested one. (`lax.fori_loop` with a traced bound
is legal here because the forward and the backward pass are both written out.)

Rows of all trees stand in one array [R, ...], R = P * T + size: every tree's
tokens in sorted order, tree after tree, and room for the last block's end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tree_ffn.tree.blocks import Blocks, Weights, path_of_leaves, path_sides, path_threshold
from tree_ffn.tree.gates import hidden_on_path
from tree_ffn.tree.layout import Layout
from tree_ffn.tree.spec import TreeSpec


class _Work(NamedTuple):
    """The real blocks of all trees, one after the other; `count` of the K entries are used."""

    size: int  # rows of a block
    tree: jax.Array  # [K]
    leaf: jax.Array  # [K]
    row: jax.Array  # [K] first row in the arrays of all trees, p * T + position
    n_rows: jax.Array  # [K] rows in use
    token: jax.Array  # [R] token of every row
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
    return _Work(size, tree, blocks_P.leaf_M[tree, block], row, blocks_P.rows_M[tree, block], token, ends[-1])


def block_size(n_tokens: int, n_leaves: int) -> int:
    """One and a half times the mean run of a leaf, as a multiple of 16, within 16 and 128 (or T).

    Shorter blocks reach less of a core's rate and re-read a path's weights
    more often, longer ones multiply more rows that are not there.
    """
    size = 16
    while size < 128 and 2 * size * n_leaves < 3 * n_tokens:
        size += 16
    return min(size, n_tokens)


def forward(weights: Weights, x_TE: jax.Array, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Sum of the trees and the pre-activations that the backward pass needs.

    Args:
      weights: of all trees, [P, ...].
      x_TE: tokens.
      blocks_P: tables of every tree, stacked [P, ...].
      size: rows of a block.
      spec: the layer.

    Returns:
      s_TE float32; z float32 [R, path_units].
    """
    work, layout = _work_list(blocks_P, size), weights.layout(spec)
    z_RA = _into_units(_sorted_rows(x_TE, work), weights.w_in, work, layout)
    z_RA += _bias(weights, blocks_P, work, layout)
    h_RA = hidden_on_path(z_RA, *_decisions(weights, blocks_P, work, layout)).astype(x_TE.dtype)
    return _sum_of_trees(_out_of_units(h_RA, weights.w_out, work, layout.outputs), blocks_P), z_RA


def backward(weights: Weights, x_TE, ds_TE, z_RA, blocks_P: Blocks, size: int, spec: TreeSpec):
    """Gradients: dx_TE, dw_in, db_in and dw_out of all trees, float32."""
    dtype = x_TE.dtype
    work, layout = _work_list(blocks_P, size), weights.layout(spec)
    x_RE, ds_RE = _sorted_rows(x_TE, work), _sorted_rows(ds_TE, work)
    dh_RA = _into_units(ds_RE, weights.w_out, work, layout.outputs)
    decisions = _decisions(weights, blocks_P, work, layout)
    h_RA, vjp = jax.vjp(lambda z_RA: hidden_on_path(z_RA, *decisions), z_RA)
    (dz_RA,) = vjp(dh_RA)
    db_in_PU = _sum_by_node(dz_RA, blocks_P, layout)
    h_RA, dz_RA = h_RA.astype(dtype), dz_RA.astype(dtype)
    dx_RE = _out_of_units(dz_RA, weights.w_in, work, layout)
    dw_in_PUE, dw_out_PUE = _weight_gradients(
        (dz_RA, x_RE, weights.w_in.shape, layout),
        (h_RA, ds_RE, weights.w_out.shape, layout.outputs),
        work=work,
    )
    return _sum_of_trees(dx_RE, blocks_P), dw_in_PUE, db_in_PU, dw_out_PUE


def _into_units(rows_RE, w_PUE, work: _Work, layout: Layout):
    """Products of every row with its path's units: float32 [R, path_units]."""

    def one_block(i, out_RA):
        products = _matmul("be,ae->ba", _rows(rows_RE, i, work), _path(w_PUE, i, work, layout))
        return _write_rows(out_RA, products, i, work)

    out_RA = jnp.zeros((rows_RE.shape[0], layout.path_units), jnp.float32)
    return jax.lax.fori_loop(0, work.count, one_block, out_RA)


def _out_of_units(h_RA, w_PUE, work: _Work, layout: Layout):
    """Sums of every row's path's units, weighted by h: float32 [R, E]."""

    def one_block(i, out_RE):
        sums = _matmul("ba,ae->be", _rows(h_RA, i, work), _path(w_PUE, i, work, layout))
        return _write_rows(out_RE, sums, i, work)

    out_RE = jnp.zeros((h_RA.shape[0], w_PUE.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, work.count, one_block, out_RE)


def _weight_gradients(*sums, work: _Work):
    """Sums over rows of h[a] rows[e], for each (h [R, path units], rows [R, E], shape [P, U, E], layout)."""

    def one_block(i, grads):
        real_B1 = (jnp.arange(work.size) < work.n_rows[i])[:, None]
        added = []
        for grad_PUE, (h_RA, rows_RE, _, layout) in zip(grads, sums):
            h_BA = jnp.where(real_B1, _rows(h_RA, i, work), jnp.zeros((), h_RA.dtype))
            product = _matmul("ba,be->ae", h_BA, _rows(rows_RE, i, work))
            added.append(_add_path(grad_PUE, product, i, work, layout))
        return added

    zeros = [jnp.zeros(shape, jnp.float32) for _, _, shape, _ in sums]
    return jax.lax.fori_loop(0, work.count, one_block, zeros)


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
        return sum_TE + jnp.take(rows, row_T, axis=0, mode="clip")

    return jax.lax.fori_loop(0, n_trees, add_tree, jnp.zeros((n_tokens, rows.shape[1]), jnp.float32))


def _matmul(subscripts: str, a, b):
    """Product with a float32 result; the weights `b` come in their own dtype."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _rows(rows_R, i, work: _Work):
    return jax.lax.dynamic_slice_in_dim(rows_R, work.row[i], work.size)


def _write_rows(rows_R, block_B, i, work: _Work):
    # Blocks come in sorted order, so rows beyond a block's last are overwritten
    # by the next block, and the last block's are never read.
    return jax.lax.dynamic_update_slice(rows_R, block_B, (work.row[i], 0))


def _bias(weights: Weights, blocks_P: Blocks, work: _Work, layout: Layout):
    """Biases of every row's path's units: float32 [R, path_units]."""
    of_tree = lambda b_in_U, leaf_T: path_of_leaves(b_in_U.astype(jnp.float32), layout)[leaf_T]
    bias_PTA = jax.vmap(of_tree)(weights.b_in, blocks_P.leaf_T)
    return jnp.pad(bias_PTA.reshape(-1, layout.path_units), ((0, work.size), (0, 0)))


def _sum_by_node(dz_RA, blocks_P: Blocks, layout: Layout):
    """Sums of every tree's rows over the tokens that visit each unit: [P, U]."""
    n_trees, n_tokens = blocks_P.leaf_T.shape

    def of_tree(dz_TA, leaf_T):
        by_leaf_JA = jax.ops.segment_sum(dz_TA, leaf_T, layout.n_leaves, indices_are_sorted=True)
        runs = [
            layout.per_node(level, by_leaf_JA[:, start : start + width]).reshape(-1)
            for level, (start, width) in enumerate(zip(layout.path_starts, layout.widths))
        ]
        return jnp.concatenate(runs)

    dz_PTA = dz_RA[: n_trees * n_tokens].reshape(n_trees, n_tokens, -1)
    return jax.vmap(of_tree)(dz_PTA, blocks_P.leaf_T)


def _decisions(weights: Weights, blocks_P: Blocks, work: _Work, layout: Layout):
    """What `hidden_on_path` takes beside z: thresholds on every row's path [R, D], the layer, sides."""
    of_tree = lambda threshold_N, leaf_T: path_threshold(threshold_N, leaf_T, layout)
    threshold_PTD = jax.vmap(of_tree)(weights.threshold, blocks_P.leaf_T)
    threshold_RD = threshold_PTD.reshape(blocks_P.leaf_T.size, layout.spec.shape.depth)
    # Rows beyond the last token's take the way to leaf 0; none reads them.
    right_RD = path_sides(jnp.pad(blocks_P.leaf_T.reshape(-1), (0, work.size)), layout)
    return jnp.pad(threshold_RD, ((0, work.size), (0, 0))), layout.spec, right_RD


def _runs(i, work: _Work, layout: Layout):
    """Where a block's path has its units: (level, start in [P, U, E], width)."""
    for level, width in layout.levels:
        first = layout.unit_starts[level] + layout.ancestor(level, work.leaf[i]) * width
        yield level, (work.tree[i], first, 0), width


def _path(w_PUE, i, work: _Work, layout: Layout):
    """Weights of the units on a block's path, root first: [path_units, E]."""
    runs = [
        jax.lax.dynamic_slice(w_PUE, start, (1, width, w_PUE.shape[2]))[0]
        for _, start, width in _runs(i, work, layout)
    ]
    return jnp.concatenate(runs, axis=0)


def _add_path(grad_PUE, rows_AE, i, work: _Work, layout: Layout):
    """Adds `rows_AE` to the rows of a block's path, a run a level, in place inside a loop."""
    for level, start, width in _runs(i, work, layout):
        rows = rows_AE[layout.path_starts[level] :][:width]
        here = jax.lax.dynamic_slice(grad_PUE, start, (1, *rows.shape))
        grad_PUE = jax.lax.dynamic_update_slice(grad_PUE, here + rows[None], start)
    return grad_PUE
