"""The layer as mathematics: pure functions of jax arrays.

A compiled kernel goes into `tree/kernels/`, beside the plain form it falls back
to: a third form of the block products is chosen in `grouped._form`, a whole
execution is one more entry of `IMPLEMENTATIONS`.
"""

from tree_ffn.tree.activations import ACTIVATIONS, activation
from tree_ffn.tree.apply import IMPLEMENTATIONS, pick_implementation, tree_ffn
from tree_ffn.tree.balancing import balance_by_counts, balance_update
from tree_ffn.tree.leaking import Leaking
from tree_ffn.tree.pruned import prune
from tree_ffn.tree.shape import TreeShape
from tree_ffn.tree.spec import Info, PrunedSpec, TreeSpec
from tree_ffn.tree.weights import init_params

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Info",
    "Leaking",
    "PrunedSpec",
    "TreeShape",
    "TreeSpec",
    "activation",
    "balance_by_counts",
    "balance_update",
    "init_params",
    "pick_implementation",
    "prune",
    "tree_ffn",
]
