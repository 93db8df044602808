"""Flags that say what dense layers become: experts at the leaves of trees, or the paper's paths.

_LAYER = layer_flags.define(n_trees=1)
"""

from typing import NamedTuple

from absl import flags

from tree_ffn.conversion.convert import path_layer
from tree_ffn.errors import InputError, check_positive_int, is_whole_number
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec
from tree_ffn.tree.leaf.routers import GATE_NORMS

flags.disclaim_key_flags()  # they are those of the program that calls `define`


class LayerFlags(NamedTuple):
    """The flags that `define` made."""

    n_trees: flags.FlagHolder
    n_experts: flags.FlagHolder
    expert_width: flags.FlagHolder
    top_k: flags.FlagHolder
    gate_norm: flags.FlagHolder
    depth: flags.FlagHolder
    node_width: flags.FlagHolder

    def leaves(self, n_units: int, n_trees: int = 1) -> LeafSpec:
        """The leaf layer for dense layers of so many units, at most.

        Raises:
          InputError: the flags do not say one.
        """
        check_positive_int("--expert_width", self.expert_width.value, least=0)
        check_positive_int("--n_experts", self.n_experts.value)
        return LeafSpec(
            n_experts=self.n_experts.value,
            expert_width=self.expert_width.value or -(-n_units // self.n_experts.value),
            top_k=self.top_k.value,
            n_trees=n_trees,
            gate_norm=self.gate_norm.value,
        )

    def paths(self, router: str) -> TreeSpec:
        """The path layer with its routers `separate` or `spent`.

        Raises:
          InputError: the flags do not say one.
        """
        words = self.node_width.value
        if not words or not all(is_whole_number(word.strip()) for word in words):
            raise InputError(
                f"--node_width: {','.join(words)!r} is not allowed; use whole numbers, e.g. 1,1,32."
            )
        widths = tuple(map(int, words))
        shape = TreeShape(self.n_trees.value, self.depth.value, widths[0] if len(widths) == 1 else widths)
        return path_layer(shape, router)


def define(n_trees: int) -> LayerFlags:
    """Defines the flags; `n_trees` is the default of the flag of that name."""
    return LayerFlags(
        flags.DEFINE_integer("n_trees", n_trees, "P, trees of a layer."),
        flags.DEFINE_integer("n_experts", 512, "X, experts of a leaf layer: the leaves of its trees."),
        flags.DEFINE_integer("expert_width", 0, "W, units of an expert; 0: as few as have room."),
        flags.DEFINE_integer("top_k", 16, "K, experts that a token uses."),
        flags.DEFINE_enum("gate_norm", "rms", list(GATE_NORMS), "What of a token's gates is 1 (LeafSpec)."),
        flags.DEFINE_integer("depth", 7, "D, decisions of a path."),
        flags.DEFINE_list("node_width", ["1"], "W, units of a path's node: one number, or one a level."),
    )


def refuse(kind: str, given: list[flags.FlagHolder]) -> None:
    """Raises InputError if one of these flags was given, which `--kind=KIND` does not read."""
    for flag in given:
        if flag.present:
            raise InputError(f"--{flag.name}: is not allowed with --kind={kind}; leave it out.")
