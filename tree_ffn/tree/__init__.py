"""The layers as mathematics: pure functions of jax arrays.

A router chooses K of X experts for a token and says how much each counts (`leaf.route`, `path.route`); an
implementation adds them up (`combine`). A compiled kernel goes into `tree/kernels/`, beside the plain form
it falls back to.
"""

from tree_ffn.tree.activations import ACTIVATIONS, activation
from tree_ffn.tree.combine import IMPLEMENTATIONS, combine
from tree_ffn.tree.info import Info
from tree_ffn.tree.leaf import LeafSpec, leaf_ffn
from tree_ffn.tree.path import PrunedSpec, TreeSpec, prune, tree_ffn
from tree_ffn.tree.shape import TreeShape

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Info",
    "LeafSpec",
    "PrunedSpec",
    "TreeShape",
    "TreeSpec",
    "activation",
    "combine",
    "leaf_ffn",
    "prune",
    "tree_ffn",
]
