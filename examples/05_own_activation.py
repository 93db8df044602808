"""An activation of one's own: one entry of a table, and all layers, implementations and configs know it.

python examples/05_own_activation.py
"""

import jax
import jax.numpy as jnp

from tree_ffn import ACTIVATIONS, FFN, LeafSpec, TreeShape, TreeSpec

ACTIVATIONS["square"] = jnp.square


def main():
    x, found = jnp.ones((3, 16)), {}
    for spec in (
        LeafSpec(n_experts=8, expert_width=2, top_k=2, activation="square"),
        TreeSpec(TreeShape(n_trees=2, depth=3), activation="square"),
    ):
        y, _ = jax.jit(FFN(spec).init_with_output)(jax.random.key(0), x)[0]
        found[type(spec).__name__] = y
        print(type(spec).__name__, y.shape)
    return found


if __name__ == "__main__":
    main()
