"""Small layers of every kind, and models of them, shared by the tests of models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.models import DenseSpec, ModelSpec, Transformer
from tree_ffn.models.cost import abstract_variables
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeShape, TreeSpec
from tree_ffn.tree.leaf.pruned import kept_row
from tree_ffn.tree.path.pruned import init_structure

SHAPE = TreeShape(n_trees=2, depth=2, node_width=2)

KINDS = {
    "dense": DenseSpec(width=24),
    "narrow": DenseSpec(width=SHAPE.active_units),
    "hard": TreeSpec(SHAPE, routing="hard"),
    "straight_through": TreeSpec(SHAPE, routing="straight_through"),
    "random_tree": TreeSpec(SHAPE, router="frozen"),
    "leaf": LeafSpec(n_experts=8, expert_width=2, top_k=3, balance_rate=1e-2),
    "leaf_softmax": LeafSpec(
        n_experts=5, expert_width=3, top_k=2, router="softmax", gate_norm="l1", balance_rate=1e-3
    ),
    "leaf_hash": LeafSpec(n_experts=4, expert_width=5, top_k=1, router="hash", gate_norm="none"),
    "pruned_leaf": LeafSpec(n_experts=8, expert_width=2, top_k=3, n_kept=5),
    "pruned": PrunedSpec(SHAPE, nodes=(2, 3, 4)),
    "pruned_random_tree": PrunedSpec(SHAPE, router="frozen", nodes=(2, 2, 3)),
}


def model_spec(*ffns, **fields) -> ModelSpec:
    """A tiny decoder with the given layers, or a field changed."""
    values = {"vocab_size": 23, "max_seq_len": 16, "width": 16, "n_heads": 2} | fields
    return ModelSpec(n_layers=len(ffns), ffns=ffns, **values)


def random_leaves(shapes, seed: int = 0):
    """Weights without compiling an initialiser: normal, with biases that are not zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        std = 0.3 if path[-1].key.startswith(("w_", "tokens", "positions")) else 0.1
        mean = 1.0 if path[-1].key == "scale" else 0.0
        if jnp.issubdtype(shape.dtype, jnp.integer):  # the structure of pruned trees
            return jnp.zeros(shape.shape, shape.dtype)
        return jnp.asarray(mean + std * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_variables(spec: ModelSpec, seed: int = 0) -> dict:
    """`random_leaves` for a model."""
    variables = random_leaves(abstract_variables(spec), seed)
    for i, (ffn, length) in enumerate(spec.runs):
        if isinstance(ffn, PrunedSpec):
            structure = {name: jnp.stack([a] * length) for name, a in init_structure(ffn).items()}
            variables["routing"][f"run_{i}"]["ffn"] |= structure
        elif isinstance(ffn, LeafSpec) and ffn.n_kept:
            row = jnp.asarray(kept_row(np.arange(ffn.n_experts) >= ffn.n_experts - ffn.n_kept))
            variables["routing"][f"run_{i}"]["ffn"] |= {"kept_row": jnp.stack([row] * length)}
    return variables


@functools.cache
def forward(spec: ModelSpec):
    """The compiled model, once for all tests."""
    return jax.jit(Transformer(spec).apply)
