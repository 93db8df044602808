"""Of all experts and the K chosen: numbers are read at the chosen ids, and put there among zeros.

The two are each other's transpose. Both are exact, by index as by comparison. A CPU does them by index, where
to sum a mask [T, K, X] takes hundreds of times as long; elsewhere the comparisons become part of the program
that uses their results, and differentiating one gives the other and no sum over colliding indices. On a TPU
they are written out, a step for each k: by its compiler's estimate that takes a seventh of a sum over k.
"""

import functools

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
    if platform() == "tpu":
        found = [jnp.where(is_TX, value_TX, 0).sum(axis=1) for is_TX in _each(ids_TK, value_TX.shape[1])]
        return jnp.stack(found, axis=1)
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
    if platform() == "tpu":
        values = [value_TK[:, k, None] for k in range(ids_TK.shape[1])]
        parts = [jnp.where(is_TX, value_T1, 0) for is_TX, value_T1 in zip(_each(ids_TK, size), values)]
        return functools.reduce(jnp.add, parts)
    return jnp.where(_is(ids_TK, size), value_TK[:, :, None], 0).sum(axis=1)


def _is(ids_TK: jax.Array, size: int) -> jax.Array:
    """Whether an expert is the k-th chosen: [T, K, X]."""
    return ids_TK[:, :, None] == jnp.arange(size, dtype=ids_TK.dtype)[None, None]


def _each(ids_TK: jax.Array, size: int) -> list[jax.Array]:
    """The same for each k: K times [T, X]."""
    return [ids_TK[:, k, None] == jnp.arange(size, dtype=ids_TK.dtype)[None] for k in range(ids_TK.shape[1])]
