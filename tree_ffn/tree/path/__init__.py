"""The path layer: every token walks one hard path down every tree, and its nodes' units work.

`route` finds the paths; `tree_ffn.tree.combine` adds their units up, as it does experts.
"""

from tree_ffn.tree.path.layer import balance_update, init_params, tree_ffn
from tree_ffn.tree.path.pruned import prune
from tree_ffn.tree.path.route import route
from tree_ffn.tree.path.spec import PrunedSpec, TreeSpec

__all__ = ["PrunedSpec", "TreeSpec", "balance_update", "init_params", "prune", "route", "tree_ffn"]
