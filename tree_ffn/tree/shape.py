"""Counts and heap indices of trees: plain integers, no arrays.

A tree is a full binary tree in heap order: the root is node 0 and the children
of node n are 2n + 1 (left) and 2n + 2 (right). A node of level l carries W_l
units, and a tree's units are stored in (level, node, unit) order.
"""

import dataclasses
import functools

from tree_ffn.errors import InputError, check_positive_int


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The size of a path layer: P trees of depth D.

    With L = D + 1 levels and `node_width` W (or one W_l per level):

        units of a tree   U = sum_l 2^l W_l
        units in all      F = P U
        active units      A = P sum_l W_l

    Attributes:
      n_trees: P, at least 1.
      depth: D, the number of decisions on a path; 0 gives a dense layer.
      node_width: W, the units of a node: one number, or one per level (D + 1).

    Raises:
      InputError: names the field, its value and what is allowed.

    Example:
      >>> shape = TreeShape(n_trees=12, depth=7, node_width=1)
      >>> shape.total_units, shape.active_units
      (3060, 96)
    """

    n_trees: int
    depth: int
    node_width: int | tuple[int, ...] = 1

    def __post_init__(self):
        check_positive_int("n_trees", self.n_trees)
        check_positive_int("depth", self.depth, least=0)
        for field in ("n_trees", "depth"):  # of NumPy's too
            object.__setattr__(self, field, int(getattr(self, field)))
        if self.depth > 20:
            raise InputError(f"depth: {self.depth} is not allowed; use 0 to 20 (2**21 nodes a tree).")
        if isinstance(self.node_width, list):
            object.__setattr__(self, "node_width", tuple(self.node_width))
        if isinstance(self.node_width, tuple) and len(self.node_width) != self.n_levels:
            raise InputError(
                f"node_width: {self.node_width} has {len(self.node_width)} widths; depth {self.depth} "
                f"has {self.n_levels} levels, so use one number or {self.n_levels} of them."
            )
        for width in self.widths:
            check_positive_int("node_width", width)
        if isinstance(self.node_width, tuple) and len(set(self.node_width)) == 1:  # one shape, one value
            object.__setattr__(self, "node_width", self.node_width[0])

    @property
    def n_levels(self) -> int:
        """L = D + 1."""
        return self.depth + 1

    @property
    def n_nodes(self) -> int:
        """N = 2^L - 1, per tree."""
        return 2**self.n_levels - 1

    @property
    def n_deciding(self) -> int:
        """R = 2^D - 1: the nodes above the bottom level, per tree."""
        return 2**self.depth - 1

    @property
    def n_leaves(self) -> int:
        """2^D: the nodes of the bottom level, per tree."""
        return 2**self.depth

    @property
    def widths(self) -> tuple[int, ...]:
        """W_l for every level l."""
        if isinstance(self.node_width, tuple):
            return self.node_width
        return (self.node_width,) * self.n_levels

    @functools.cached_property
    def level_starts(self) -> tuple[int, ...]:
        """First unit of every level; one more entry, U, closes the last level."""
        starts = [0]
        for level, width in enumerate(self.widths):
            starts.append(starts[-1] + 2**level * width)
        return tuple(starts)

    @property
    def tree_units(self) -> int:
        """U."""
        return self.level_starts[-1]

    @property
    def path_units(self) -> int:
        """sum_l W_l: the units that one path of one tree visits."""
        return sum(self.widths)

    @property
    def total_units(self) -> int:
        """F = P U."""
        return self.n_trees * self.tree_units

    @property
    def active_units(self) -> int:
        """A = P sum_l W_l."""
        return self.n_trees * self.path_units

    @property
    def active_share(self) -> float:
        """A / F."""
        return self.active_units / self.total_units

    @functools.cached_property
    def router_units(self) -> tuple[int, ...]:
        """The first unit of every deciding node, in heap order: R indices into U."""
        units = []
        for level in range(self.depth):
            start, width = self.level_starts[level], self.widths[level]
            units.extend(start + node * width for node in range(2**level))
        return tuple(units)

    def node_units(self, node: int) -> range:
        """The units of heap node `node`, as indices into U."""
        level = level_of(node)
        first = self.level_starts[level] + (node - (2**level - 1)) * self.widths[level]
        return range(first, first + self.widths[level])


def level_of(node: int) -> int:
    """Level of heap node `node`; the root is at level 0.

    Example:
      >>> [level_of(n) for n in (0, 1, 2, 3, 6, 7)]
      [0, 1, 1, 2, 2, 3]
    """
    return (node + 1).bit_length() - 1


def path_of(leaf: int, depth: int) -> tuple[int, ...]:
    """Heap nodes from the root to leaf number `leaf` (0 is the leftmost).

    Example:
      >>> path_of(leaf=5, depth=3)   # 5 = 0b101: right, left, right
      (0, 2, 5, 12)
    """
    return tuple((2**level - 1) + (leaf >> (depth - level)) for level in range(depth + 1))
