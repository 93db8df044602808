"""What a path layer computes, as one frozen and hashable value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_choice, check_number
from tree_ffn.tree.activations import ACTIVATIONS, activation
from tree_ffn.tree.shape import TreeShape

ROUTINGS = ("hard", "straight_through")
ACT_SITES = ("node", "sum")
ROUTERS = ("first_unit", "frozen")


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Shape, activation and routing of a path layer.

    Attributes:
      shape: P, D, W.
      activation: a name of `activations.ACTIVATIONS`.
      act_site: `node`, act of every unit; or `sum`, act of the summed output.
      routing: how decisions learn: `hard` (they do not), or `straight_through` (a sigmoid surrogate in the
        backward pass).
      balance_rate: step by which thresholds follow the sign of the visit skew; 0: they do not.
      router: what decides at a node: its `first_unit` (the layer itself); or a separate `frozen` vector that
        no optimizer trains: random (the baseline `random_tree`), or fitted where a dense layer was converted.

    Raises:
      InputError: names the field, its value and what is allowed.

    Example:
      >>> spec = TreeSpec(TreeShape(n_trees=12, depth=7))
      >>> spec.total_units, spec.active_units, spec.n_routers
      (3060, 96, 0)
    """

    shape: TreeShape
    activation: str = "gelu"
    act_site: str = "node"
    routing: str = "hard"
    balance_rate: float = 0.0
    router: str = "first_unit"

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("act_site", self.act_site, ACT_SITES)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("router", self.router, ROUTERS)
        check_number("balance_rate", self.balance_rate, least=0)
        if self.router == "frozen" and self.routing != "hard":
            raise InputError(
                f"routing: {self.routing!r} cannot be used with router 'frozen': no decision learns; use "
                "'hard'."
            )
        for field, value, nothing in (
            ("balance_rate", self.balance_rate, 0),
            ("routing", self.routing, "hard"),
            ("router", self.router, "first_unit"),
        ):
            if value != nothing and not self.shape.depth:
                raise InputError(
                    f"{field}: {value!r} cannot be used with depth 0, where nothing is decided; use "
                    f"{nothing!r}."
                )
        if self.act_site == "sum" and self.activation == "identity":
            raise InputError(
                "act_site: 'sum' cannot be used with activation 'identity', of which the sum is the same at "
                "nodes; use 'node'."
            )

    @property
    def n_routers(self) -> int:
        """Products of E numbers a token, beside those of units, by which a token finds its paths."""
        return self.shape.n_trees * self.shape.depth if self.router == "frozen" else 0

    @property
    def level_nodes(self) -> tuple[int, ...]:
        """Nodes of every level, all trees together."""
        return tuple(self.shape.n_trees * 2**level for level in range(self.shape.n_levels))

    @property
    def level_starts(self) -> tuple[int, ...]:
        """First unit of every level, of each tree; one more entry closes the last."""
        return self.shape.level_starts

    @property
    def total_units(self) -> int:
        """F."""
        return sum(count * width for count, width in zip(self.level_nodes, self.shape.widths))

    @property
    def active_units(self) -> int:
        """A."""
        return self.shape.active_units

    @property
    def n_experts(self) -> int:
        """Paths of all trees: what ids number for `combine`, whose experts share units here."""
        return self.shape.n_trees * self.shape.n_leaves

    @property
    def act(self):
        """What becomes of a unit's pre-activation before w_out."""
        return activation(self.activation) if self.act_site == "node" else lambda z: z

    def runs(self, params: dict, ids: jax.Array) -> list[tuple[jax.Array, int]]:
        """Where the units of paths stand in [F, ...]: (first rows int32 [..., n], rows of a run)."""
        del params
        shape = self.shape
        tree, leaf = jnp.divmod(ids, shape.n_leaves)
        starts = [
            tree * shape.tree_units + self.level_starts[level] + (leaf >> (shape.depth - level)) * width
            for level, width in enumerate(shape.widths)
        ]
        return _joined(starts, shape.widths)

    def unit_gates(self, params: dict, ids_TP: jax.Array, gates_TP: jax.Array) -> jax.Array:
        """Gates of all units of the trees, 0 off the paths: [T, F]. Path p is one of tree p.

        Args:
          params: the layer's arrays; full trees need none.
          ids_TP: int32, of `route`.
          gates_TP: of the paths.
        """
        del params
        shape = self.shape
        leaf_TP = ids_TP % shape.n_leaves
        levels = [
            (leaf_TP >> (shape.depth - level))[..., None] == jnp.arange(2**level, dtype=jnp.int32)[None, None]
            for level in range(shape.n_levels)
        ]
        return self.of_units([jnp.where(level, gates_TP[..., None], 0.0) for level in levels])

    def of_units(self, levels: list[jax.Array]) -> jax.Array:
        """Numbers of nodes, a list of [T, P, 2^l], to those of their units, [T, F]."""
        runs = [jnp.repeat(level, width, axis=-1) for level, width in zip(levels, self.shape.widths)]
        return jnp.concatenate(runs, axis=-1).reshape(levels[0].shape[0], self.total_units)


@dataclasses.dataclass(frozen=True)
class PrunedSpec(TreeSpec):
    """A path layer from which subtrees were removed; a token whose child is gone goes to the sibling.

    The fields of TreeSpec say what the trees were: `shape` counts the nodes of
    the full trees, and leaves keep their numbers. A path still visits D + 1
    nodes. What is kept, the arrays of the layer hold (see `tree.path.pruned`).

    Attributes:
      nodes: kept nodes of every level, all trees together: nodes[0] = P, and
        every level has at least as many as the one above and at most twice that.

    Raises:
      InputError: `nodes` cannot be that.

    Example:
      >>> spec = PrunedSpec(TreeShape(n_trees=2, depth=2, node_width=3), nodes=(2, 3, 4))
      >>> spec.total_units, spec.shape.total_units
      (27, 42)
    """

    nodes: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "nodes", tuple(self.nodes))
        pairs = zip(self.nodes, self.nodes[1:])
        right_length = len(self.nodes) == self.shape.n_levels
        if not (
            right_length and self.nodes[0] == self.shape.n_trees and all(a <= b <= 2 * a for a, b in pairs)
        ):
            raise InputError(
                f"nodes: {self.nodes} is not allowed; use {self.shape.n_levels} numbers (of depth "
                f"{self.shape.depth}), the first n_trees = {self.shape.n_trees}, each of the others as large "
                "as the one before up to twice that."
            )

    @property
    def level_nodes(self) -> tuple[int, ...]:
        """Kept nodes of every level, all trees together."""
        return self.nodes

    @property
    def n_experts(self) -> int:
        """Paths that are left."""
        return self.nodes[-1]

    @property
    def is_one_path(self) -> bool:
        """Whether every tree has one path left."""
        return self.nodes[-1] == self.shape.n_trees

    @property
    def level_starts(self) -> tuple[int, ...]:
        """First unit of every level, of all trees together; one more entry closes the last."""
        sizes = [count * width for count, width in zip(self.nodes, self.shape.widths)]
        return (0, *map(int, np.cumsum(sizes)))

    def runs(self, params: dict, ids: jax.Array) -> list[tuple[jax.Array, int]]:
        """As of full trees; ids are places in the bottom level."""
        place = jnp.take(params["path"], ids, axis=0, mode="clip")  # in range by construction
        starts = [
            start + place[..., level] * width
            for level, (start, width) in enumerate(zip(self.level_starts, self.shape.widths))
        ]
        return _joined(starts, self.shape.widths)

    def unit_gates(self, params: dict, ids_TP: jax.Array, gates_TP: jax.Array) -> jax.Array:
        """As of full trees."""
        place_TPL = jnp.take(params["path"], ids_TP, axis=0, mode="clip")
        runs = []
        for level, (count, width) in enumerate(zip(self.nodes, self.shape.widths)):
            is_there_TPJ = place_TPL[..., level, None] == jnp.arange(count, dtype=jnp.int32)[None, None]
            gate_TJ = jnp.where(is_there_TPJ, gates_TP[..., None], 0.0).sum(axis=1)
            runs.append(jnp.repeat(gate_TJ, width, axis=-1))
        return jnp.concatenate(runs, axis=-1)


def _joined(starts: list[jax.Array], widths: tuple[int, ...]) -> list[tuple[jax.Array, int]]:
    """Runs of the levels; of equal widths as one list of first rows."""
    if len(set(widths)) == 1:
        return [(jnp.stack(starts, axis=-1), widths[0])]
    return [(start[..., None], width) for start, width in zip(starts, widths)]
