"""Where a layer's units stand: full trees by arithmetic, pruned ones by index arrays.

The executions ask a layout and so run both kinds of trees by one code. Inside
a tree, or inside a pruned layer, units stand in (level, node, unit) order; a
node is named by its level and its place in it.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.spec import PrunedSpec, TreeSpec


class Layout:
    """Full trees: arrays [P, U, ...], a node's place is counted within its tree.

    Attributes:
      spec: the layer.
      nodes: number of nodes in every level.
      node_starts: first node of every level, in arrays of one entry a node.
      widths: units of a node, for every level.
      unit_starts: first unit of every level; one more entry closes the last.
      path_starts: the same among the units of one path.
    """

    def __init__(self, spec: TreeSpec, nodes: tuple[int, ...] | None = None):
        self.spec = spec
        self.nodes = nodes or tuple(2**level for level in range(spec.shape.n_levels))
        self.node_starts = (0, *map(int, np.cumsum(self.nodes)))
        self._set_widths(spec.shape.widths)

    def _set_widths(self, widths: tuple[int, ...]) -> None:
        units = [count * width for count, width in zip(self.nodes, widths)]
        self.widths, self.unit_starts = widths, (0, *map(int, np.cumsum(units)))
        self.path_starts = (0, *map(int, np.cumsum(widths)))

    @property
    def outputs(self) -> "Layout":
        """Where the rows of w_out stand: silent routers have none, so some levels may be empty."""
        layout = copy.copy(self)
        layout._set_widths(self.spec.output_widths)
        return layout

    @property
    def path_units(self) -> int:
        """Units of one path."""
        return self.path_starts[-1]

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(level, width) of the levels that are not empty."""
        return [(level, width) for level, width in enumerate(self.widths) if width]

    @property
    def n_leaves(self) -> int:
        """Leaves that a token can reach: of one tree, or of all pruned trees together."""
        return self.nodes[-1]

    @property
    def n_deciding(self) -> int:
        """Nodes above the bottom level."""
        return self.node_starts[-2]

    def router_units(self) -> np.ndarray:
        """The first unit of every deciding node: int32 [R]."""
        levels = zip(self.nodes[:-1], self.unit_starts, self.spec.shape.widths)
        units = [start + width * np.arange(count, dtype=np.int32) for count, start, width in levels]
        return np.concatenate([np.zeros(0, np.int32), *units])

    def first_units(self, array: jax.Array, axis: int) -> jax.Array:
        """`router_units` of an array with an entry for every unit along `axis`, by slices of its levels."""
        levels = zip(self.unit_starts, self.unit_starts[1:], self.spec.shape.widths[:-1])
        runs = [jax.lax.slice_in_dim(array, start, end, width, axis) for start, end, width in levels]
        return jnp.concatenate([jax.lax.slice_in_dim(array, 0, 0, axis=axis), *runs], axis)

    def stacked(self, params: dict) -> dict:
        """The arrays of the trees as [P, ...]; a pruned layer's, which are one forest, as [1, ...]."""
        return params

    def roots(self, n_tokens: int) -> jax.Array:
        """Where every token starts: int32 [T, P]."""
        return jnp.zeros((n_tokens, self.spec.shape.n_trees), jnp.int32)

    def child(self, level: int, place: jax.Array, right: jax.Array) -> jax.Array:
        """Place, in the level below, of the right or left child of nodes of a level."""
        return 2 * place + right.astype(jnp.int32)

    def only_right(self, level: int, place: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Where nodes of a level have one child left, and whether it is the right one; None: all have two."""
        del level, place
        return None

    def ancestor(self, level: int, leaf: jax.Array) -> jax.Array:
        """Place of the node of a level that is above (or is) each leaf."""
        return leaf >> (self.spec.shape.depth - level)

    def goes_right(self, level: int, leaf: jax.Array) -> jax.Array:
        """Whether the path to each leaf goes right from its node of a level: bool."""
        return (leaf >> (self.spec.shape.depth - 1 - level)) & 1 == 1

    def sides(self, leaf: jax.Array) -> jax.Array:
        """`goes_right` at every level, root first: bool [..., D]."""
        sides = [self.goes_right(level, leaf)[..., None] for level in range(self.spec.shape.depth)]
        return jnp.concatenate([jnp.zeros((*leaf.shape, 0), bool), *sides], axis=-1)

    def per_leaf(self, level: int, rows_N: jax.Array) -> jax.Array:
        """Rows of a level's nodes -> the row of each leaf's ancestor: [leaves, ...]."""
        return jnp.repeat(rows_N, 2 ** (self.spec.shape.depth - level), axis=0)

    def per_node(self, level: int, rows_J: jax.Array) -> jax.Array:
        """Rows of leaves -> their sums over the leaves below each node of a level."""
        return rows_J.reshape(2**level, -1, *rows_J.shape[1:]).sum(axis=1)


class PrunedLayout(Layout):
    """Pruned trees as one forest: arrays [U, ...], a node's place is counted over all trees.

    Args:
      spec: the layer.
      child_R2: int32, places of the left and right child of every deciding
        node in the level below; the same one twice where the other is gone.
      path_JL: int32, places of the nodes above every kept leaf, root first.
      leaf_J: int32, the number that every kept leaf has in its full tree.
    """

    def __init__(
        self,
        spec: PrunedSpec,
        child_R2: jax.Array | None = None,
        path_JL: jax.Array | None = None,
        leaf_J: jax.Array | None = None,
    ):
        super().__init__(spec, spec.nodes)
        self._child_R2: Any = child_R2
        self._path_JL: Any = path_JL
        self._leaf_J: Any = leaf_J

    def stacked(self, params: dict) -> dict:
        return jax.tree.map(lambda array: array[None], params)

    def roots(self, n_tokens: int) -> jax.Array:
        n_trees = self.spec.shape.n_trees
        return jnp.broadcast_to(jnp.arange(n_trees, dtype=jnp.int32)[None], (n_tokens, n_trees))

    def child(self, level: int, place: jax.Array, right: jax.Array) -> jax.Array:
        # Indices are in range by construction, here and below; mode="clip" costs no compare.
        node = self.node_starts[level] + place
        return jnp.take(self._child_R2.reshape(-1), 2 * node + right.astype(jnp.int32), mode="clip")

    def only_right(self, level: int, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        right_J = super().goes_right(level, self._leaf_J).astype(jnp.int32)
        right_N = jax.ops.segment_max(right_J, self._path_JL[:, level], self.nodes[level])
        start = self.node_starts[level]
        child_N2 = self._child_R2[start : start + self.nodes[level]]
        is_only_N = child_N2[:, 0] == child_N2[:, 1]
        return jnp.take(is_only_N, place, mode="clip"), jnp.take(right_N == 1, place, mode="clip")

    def ancestor(self, level: int, leaf: jax.Array) -> jax.Array:
        return jnp.take(self._path_JL[:, level], leaf, mode="clip")

    def goes_right(self, level: int, leaf: jax.Array) -> jax.Array:
        return super().goes_right(level, jnp.take(self._leaf_J, leaf, mode="clip"))

    def per_leaf(self, level: int, rows_N: jax.Array) -> jax.Array:
        return jnp.take(rows_N, self._path_JL[:, level], axis=0, mode="clip")

    def per_node(self, level: int, rows_J: jax.Array) -> jax.Array:
        place_J = self._path_JL[:, level]
        return jax.ops.segment_sum(rows_J, place_J, self.nodes[level], indices_are_sorted=True)


def layout_of(spec: TreeSpec, params: Mapping[str, Any] = MappingProxyType({})) -> Layout:
    """The layout of a layer; of a pruned one `params` has the structure, which not all methods need."""
    if isinstance(spec, PrunedSpec):
        return PrunedLayout(spec, *(params.get(name) for name in ("child", "path", "leaf")))
    return Layout(spec)
