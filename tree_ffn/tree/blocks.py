"""Tokens of one tree, sorted by leaf and cut into blocks that share one path.

Sorted by leaf, the tokens of any node stand side by side. Every leaf's run is
cut into blocks of `size` rows; a block meets exactly one path, so its work is
two small dense products with that path's units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tree_ffn.tree.layout import Layout, layout_of
from tree_ffn.tree.spec import TreeSpec


class Weights(NamedTuple):
    """What block products need of a layer; [P, ...], or one tree of it without the P.

    Pruned trees come as one tree, a forest, whose `path` says what stands above
    its leaves and whose `leaf` which they were; full trees have None there.
    """

    w_in: jax.Array
    b_in: jax.Array
    w_out: jax.Array
    threshold: jax.Array
    path: jax.Array | None = None
    leaf: jax.Array | None = None

    def layout(self, spec: TreeSpec) -> Layout:
        """Where the units of these weights stand, as stacked [P, ...]."""
        return layout_of(spec, {} if self.path is None else jax.tree.map(lambda a: a[0], self._asdict()))


class Blocks(NamedTuple):
    """Tables of one tree's blocks; M is the static bound on their number.

    Attributes:
      order_T: token at every position of the sorted order.
      leaf_T: leaf at every position of the sorted order.
      leaf_M: leaf of every block.
      first_M: position of its first row in the sorted order.
      rows_M: real rows in it, at most `size`; 0 for blocks beyond `count`.
      count: blocks in use.
      position_T: position of every token in the sorted order.
      slot_T: row (block * size + offset) that holds each token.
    """

    order_T: jax.Array
    leaf_T: jax.Array
    leaf_M: jax.Array
    first_M: jax.Array
    rows_M: jax.Array
    count: jax.Array
    position_T: jax.Array
    slot_T: jax.Array


def max_blocks(n_tokens: int, n_leaves: int, size: int) -> int:
    """Most blocks that `n_tokens` can need: every leaf may end on a partial one."""
    return min(n_tokens, n_tokens // size + n_leaves)


def make_blocks(leaf_T: jax.Array, n_leaves: int, size: int) -> Blocks:
    """Sorts the tokens of one tree by leaf and cuts every leaf's run into blocks."""
    n_tokens = leaf_T.shape[0]
    order_T = jnp.argsort(leaf_T, stable=True).astype(jnp.int32)
    counts = jnp.bincount(leaf_T, length=n_leaves).astype(jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts = ends - counts
    blocks_of_leaf = (counts + size - 1) // size
    last_block = jnp.cumsum(blocks_of_leaf, dtype=jnp.int32)
    first_block = last_block - blocks_of_leaf

    block = jnp.arange(max_blocks(n_tokens, n_leaves, size), dtype=jnp.int32)
    leaf_M = jnp.searchsorted(last_block, block, side="right").astype(jnp.int32)
    leaf_M = jnp.minimum(leaf_M, n_leaves - 1)
    first_M = starts[leaf_M] + (block - first_block[leaf_M]) * size
    rows_M = jnp.clip(ends[leaf_M] - first_M, 0, size)
    in_use = block < last_block[-1]

    position_T = (
        jnp.zeros(n_tokens, jnp.int32)
        .at[order_T]
        .set(jnp.arange(n_tokens, dtype=jnp.int32), unique_indices=True)
    )
    offset_T = position_T - starts[leaf_T]
    slot_T = (first_block[leaf_T] + offset_T // size) * size + offset_T % size
    return Blocks(
        order_T,
        leaf_T[order_T],
        leaf_M,
        jnp.where(in_use, first_M, n_tokens),
        jnp.where(in_use, rows_M, 0),
        last_block[-1],
        position_T,
        slot_T,
    )


def path_of_leaves(units_U: jax.Array, layout: Layout) -> jax.Array:
    """One number a unit -> those of the units on every leaf's path, root first: [leaves, path_units].

    Example:
      >>> from tree_ffn.tree import TreeShape
      >>> layout = layout_of(TreeSpec(TreeShape(n_trees=1, depth=1)))
      >>> path_of_leaves(jnp.array([7, 8, 9]), layout).tolist()
      [[7, 8], [7, 9]]
    """
    runs = []
    for level, width in layout.levels:
        nodes_NW = units_U[layout.unit_starts[level] : layout.unit_starts[level + 1]].reshape(-1, width)
        runs.append(layout.per_leaf(level, nodes_NW))
    return jnp.concatenate(runs, axis=1)


def path_threshold(threshold_N: jax.Array, leaf: jax.Array, layout: Layout) -> jax.Array:
    """Thresholds of the deciding nodes above `leaf` (any shape): [..., D]."""
    depth = layout.spec.shape.depth
    nodes = [layout.node_starts[level] + layout.ancestor(level, leaf) for level in range(depth)]
    if not nodes:
        return jnp.zeros((*leaf.shape, 0), jnp.float32)
    return threshold_N[jnp.stack(nodes, axis=-1)].astype(jnp.float32)


def path_sides(leaf: jax.Array, layout: Layout) -> jax.Array | None:
    """Whether the paths to `leaf` (any shape) go right, bool [..., D]: where gates ask, else None."""
    return None if layout.spec.beam == 1 else layout.sides(leaf)
