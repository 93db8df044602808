"""Of all experts and the K chosen: numbers are read at the chosen ids, and put there among zeros.

The two are each other's transpose. Both are exact, by index as by comparison. A CPU does them by index, where
to sum a mask [T, K, X] takes hundreds of times as long; elsewhere the comparisons become part of the program
that uses their results, and differentiating one gives the other and no sum over colliding indices.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.meshes import platform

# Ids of a token are distinct and in range.
_HOW = {"mode": "promise_in_bounds", "unique_indices": True}


def read(value_TX: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """Values at ids: [T, K].

    Args:
      value_TX: of all.
      ids_TK: int32, distinct for each token.

    Example:
      >>> read(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[2, 0]])).tolist()
      [[3.0, 1.0]]
    """
    if platform() == "cpu":
        return jax.vmap(lambda value_X, ids_K: value_X.at[ids_K].get(**_HOW))(value_TX, ids_TK)
    return jnp.where(_is(ids_TK, value_TX.shape[1]), value_TX[:, None], 0).sum(axis=2)


def put(value_TK: jax.Array, ids_TK: jax.Array, size: int) -> jax.Array:
    """Values at ids, 0 elsewhere: [T, X].

    Args:
      value_TK: of the chosen.
      ids_TK: int32, distinct for each token.
      size: X.

    Example:
      >>> put(jnp.array([[3.0, 1.0]]), jnp.array([[2, 0]]), 4).tolist()
      [[1.0, 0.0, 3.0, 0.0]]
    """
    if platform() == "cpu":
        none_X = jnp.zeros(size, value_TK.dtype)
        return jax.vmap(lambda value_K, ids_K: none_X.at[ids_K].set(value_K, **_HOW))(value_TK, ids_TK)
    return jnp.where(_is(ids_TK, size), value_TK[:, :, None], 0).sum(axis=1)


def _is(ids_TK: jax.Array, size: int) -> jax.Array:
    """Whether an expert is the k-th chosen: [T, K, X]."""
    return ids_TK[:, :, None] == jnp.arange(size, dtype=ids_TK.dtype)[None, None]
