"""What a layer of trees computes, as one frozen and hashable value."""

import dataclasses
from typing import NamedTuple

import jax

from tree_ffn.errors import InputError, check_choice, check_number, check_positive_int
from tree_ffn.tree.activations import ACTIVATIONS
from tree_ffn.tree.leaking import Leaking
from tree_ffn.tree.shape import TreeShape

ROUTINGS = ("hard", "straight_through", "continuous")
GATES = ("min", "product")
OPENNESS = ("exponential", "logistic")
ACT_SITES = ("node", "sum")
BALANCES = ("none", "sign")
GATE_NORMS = (1, 2)
ROUTERS = ("first_unit", "silent", "frozen")


@dataclasses.dataclass(frozen=True)
class TreeSpec(Leaking):
    """Shape, activation and routing of a layer of trees.

    Attributes:
      shape: P, D, W, S.
      activation: a name of `activations.ACTIVATIONS`.
      act_site: `node`, act of every unit; or `sum`, act of the summed output.
      routing: how decisions learn: `hard` (they do not), `straight_through`
        (a sigmoid surrogate in the backward pass), `continuous` (gates that
        vanish where a decision flips, so the exact gradient says enough).
      gate: of `continuous`: `min` or `product` of the ancestors' gates.
      openness: of `continuous`: what a decision lets through at |r| = a. `exponential`,
        c(a) = 1 - exp(-kappa a), which is 0 where the decision flips; or `logistic`,
        c(a) = 1 / (1 + exp(-kappa a)), the taken side's share of a softmax over the two
        children, which is 1/2 there: the output jumps, but no path is ever shut.
      kappa: of `continuous`: slope of the gate.
      beta: of `straight_through`: slope of the sigmoid surrogate.
      balance: `none`, or `sign`: thresholds follow the sign of the visit skew.
      balance_rate: step of that rule.
      router: what decides at a node: its `first_unit` (the layer itself); the first unit,
        `silent`, which then adds nothing to the output and learns from decisions alone (W counts its row;
        F and A, which are of units that add, do not); or a separate `frozen` vector that no optimizer
        trains: random (the baseline `random_tree`), or fitted where a dense layer was converted.
      hash_levels: decisions that are not the router's: those of the first so many levels come from a
        fixed hash of the token's id, another one in every tree and layer. Their gates are 1 and their
        nodes' first units are units like any other. With D, the baseline `hash_tree`.
      renormalise: gates are divided by the norm, over a token's trees, of its leaves' gates, as those of
        a mixture of experts are by that of the chosen.
      gate_norm: which norm: 1, leaves' gates then sum to 1 and are about 1 / P each; 2, their squares do, and
        they are about 1 / sqrt(P): the sum of P trees is then as large as that of one.
      beam: how many nodes of a level the search for a token's leaf keeps. 1 decides node by node; more
        keep those of the largest gates (then products of probabilities), and the token goes to the leaf
        of the largest gate among those that are found. 2^(D-1) finds the best of all.
      leak, leak_share: what units off the path add in training, and what gates let through at least (see
        `Leaking`).
    """

    shape: TreeShape
    activation: str = "gelu"
    act_site: str = "node"
    routing: str = "hard"
    gate: str = "min"
    openness: str = "exponential"
    kappa: float = 1.0
    beta: float = 1.0
    balance: str = "none"
    balance_rate: float = 1e-3
    router: str = "first_unit"
    hash_levels: int = 0
    renormalise: bool = False
    gate_norm: int = 1
    beam: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("gate_norm", self.gate_norm, GATE_NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("act_site", self.act_site, ACT_SITES)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("gate", self.gate, GATES)
        check_choice("openness", self.openness, OPENNESS)
        check_choice("balance", self.balance, BALANCES)
        check_choice("router", self.router, ROUTERS)
        for field in ("kappa", "beta"):
            check_number(field, getattr(self, field), above=0)
        check_number("balance_rate", self.balance_rate, least=0)
        if self.router == "silent" and self.routing == "hard":
            raise InputError(
                "routing: 'hard' cannot be used with router 'silent', which would never learn; use "
                "'straight_through' or 'continuous', or router 'first_unit'."
            )
        if self.renormalise and (self.routing, self.openness) != ("continuous", "logistic"):
            raise InputError(
                f"renormalise: True cannot be used with routing {self.routing!r} and openness "
                f"{self.openness!r}; use 'continuous' and 'logistic', whose gates are not all 1 and never 0."
            )
        check_positive_int("beam", self.beam)
        how = (self.routing, self.openness, self.gate)
        if self.beam > 1 and how != ("continuous", "logistic", "product"):
            raise InputError(
                f"beam: {self.beam} cannot be used with routing {how[0]!r}, openness {how[1]!r} and gate "
                f"{how[2]!r}; use 1, or 'continuous', 'logistic' and 'product': gates are then probabilities."
            )
        check_positive_int("hash_levels", self.hash_levels, least=0)
        if self.hash_levels > self.shape.depth:
            raise InputError(
                f"hash_levels: {self.hash_levels} is not allowed; use at most depth = {self.shape.depth}."
            )
        frozen = "router 'frozen'" if self.router == "frozen" else ""
        if self.hash_levels and self.hash_levels == self.shape.depth:
            frozen = f"hash_levels {self.hash_levels}, all of depth {self.shape.depth}"
        if frozen and self.routing != "hard":
            raise InputError(
                f"routing: {self.routing!r} cannot be used with {frozen}: no decision learns; use 'hard'."
            )
        if self.hash_levels and self.balance != "none":
            raise InputError(
                f"balance: {self.balance!r} cannot be used with hash_levels {self.hash_levels}, which leave "
                "their thresholds unread; use 'none'."
            )

    @property
    def n_routers(self) -> int:
        """Products of E numbers a token, beside those of units, by which a token finds its paths."""
        if self.beam == 1 and self.router == "first_unit":
            return 0
        asked = sum(min(2**level, self.beam) for level in range(self.shape.depth - self.hash_levels))
        # First units that a path visits are units, and count as such.
        on_path = 0 if self.router in ("silent", "frozen") else self.shape.depth - self.hash_levels
        return self.shape.n_trees * (asked - on_path)

    @property
    def stored_units(self) -> int:
        """Rows of the layer: units, and silent routers."""
        return self.shape.total_units

    @property
    def level_nodes(self) -> tuple[int, ...]:
        """Nodes of every level, all trees together."""
        return tuple(self.shape.n_trees * 2**level for level in range(self.shape.n_levels))

    @property
    def output_widths(self) -> tuple[int, ...]:
        """Units of a node, for every level, that add to the output: W_l, or all but a silent router."""
        silent = range(self.hash_levels, self.shape.depth) if self.router == "silent" else ()
        return tuple(width - (level in silent) for level, width in enumerate(self.shape.widths))

    @property
    def total_units(self) -> int:
        """F: units that add to the output."""
        of_levels = (count * width for count, width in zip(self.level_nodes, self.output_widths))
        return sum(of_levels) + self.shape.shared_width

    @property
    def active_units(self) -> int:
        """A: those of them that work for a token."""
        return self.shape.n_trees * sum(self.output_widths) + self.shape.shared_width


@dataclasses.dataclass(frozen=True)
class PrunedSpec(TreeSpec):
    """A layer of trees from which subtrees were removed; a token whose child is gone goes to the sibling.

    The fields of TreeSpec say what the trees were: `shape` counts the nodes of
    the full trees, and leaves keep their numbers. A path still visits D + 1
    nodes. What is kept, the arrays of the layer hold (see `tree.pruned`).

    Attributes:
      nodes: kept nodes of every level, all trees together: nodes[0] = P, and
        every level has at least as many as the one above and at most twice that.

    Raises:
      InputError: `nodes` cannot be that.

    Example:
      >>> spec = PrunedSpec(TreeShape(n_trees=2, depth=2, node_width=3), nodes=(2, 3, 4))
      >>> spec.kept_units, spec.shape.tree_units * 2
      (27, 42)
    """

    nodes: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.leak:
            raise InputError(
                f"leak: {self.leak!r} cannot be used in a pruned layer, which lacks units; use 0."
            )
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
    def kept_units(self) -> int:
        """Rows in the kept nodes: units, and silent routers; without the shared ones."""
        return sum(count * width for count, width in zip(self.nodes, self.shape.widths))

    @property
    def stored_units(self) -> int:
        """Rows of the layer: those of the kept nodes, and the shared units."""
        return self.kept_units + self.shape.shared_width

    @property
    def level_nodes(self) -> tuple[int, ...]:
        """Kept nodes of every level, all trees together."""
        return self.nodes

    @property
    def is_one_path(self) -> bool:
        """Whether every tree has one path left."""
        return self.nodes[-1] == self.shape.n_trees


class Info(NamedTuple):
    """What a feed-forward layer reports beside its output.

    Attributes:
      leaf_TP: int32 [T, P], the leaf (0 .. 2^D - 1, in a pruned tree too) each
        token reached in each tree; for a mixture of experts the chosen experts [T, top_k]; for a
        dense layer [T, 0].
      aux_loss: float32 scalar to add to the training loss (0 except for a
        mixture of experts with `balance="aux"`).
    """

    leaf_TP: jax.Array
    aux_loss: jax.Array
