"""The leaf layer: a router chooses and weighs K of X experts for a token; their outputs are added up.

`route` is the first half, `tree_ffn.tree.combine` the second, which sees ids and gates alone, whatever the
router is.
"""

from tree_ffn.tree.leaf.layer import balance_update, init_params, leaf_ffn
from tree_ffn.tree.leaf.pruned import prune
from tree_ffn.tree.leaf.route import route
from tree_ffn.tree.leaf.spec import LeafSpec

__all__ = ["LeafSpec", "balance_update", "init_params", "leaf_ffn", "prune", "route"]
