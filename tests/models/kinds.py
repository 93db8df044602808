"""Small layers of every kind, shared by the tests of models."""

from tree_ffn.models import DenseSpec, ModelSpec, MoESpec
from tree_ffn.tree import TreeShape, TreeSpec

SHAPE = TreeShape(n_trees=2, depth=3, node_width=2, shared_width=3)

KINDS = {
    "dense": DenseSpec(width=24),
    "narrow": DenseSpec(width=SHAPE.active_units),
    "moe": MoESpec(n_experts=4, expert_width=5, top_k=2),
    "hard": TreeSpec(SHAPE, routing="hard"),
    "straight_through": TreeSpec(SHAPE, routing="straight_through"),
    "continuous": TreeSpec(SHAPE, routing="continuous"),
    "random_tree": TreeSpec(SHAPE, router="frozen"),
}


def model_spec(*ffns, **fields) -> ModelSpec:
    """A tiny decoder with the given layers, or a field changed."""
    values = {"vocab_size": 23, "context": 16, "width": 16, "n_heads": 2} | fields
    return ModelSpec(n_layers=len(ffns), ffns=ffns, **values)
