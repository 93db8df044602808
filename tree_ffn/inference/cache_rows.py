"""Rows of key-value caches, taken out of some and put together in another."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.models.transformer import Cache


def join(parts: Sequence[tuple[Cache, Sequence[int]]], n_rows: int, room: int) -> Cache:
    """One cache of the named rows of others, in their order.

    Args:
      parts: (cache with a length for every row, the rows to take), at least one row in each.
      n_rows: rows of the new cache; those beyond the named ones repeat the last.
      room: positions of the new cache, at least what the rows have filled.

    Example:
      >>> from tree_ffn.models.attention import KeyValue
      >>> leaf = jnp.arange(4.0).reshape(1, 2, 1, 2, 1)
      >>> cache = Cache((KeyValue(leaf, leaf),), jnp.asarray([2, 1]))
      >>> new = join([(cache, [1])], n_rows=1, room=4)
      >>> new.runs[0].k.ravel().tolist(), new.length.tolist()
      ([2.0, 3.0, 0.0, 0.0], [1])
    """
    caches = [cache for cache, _ in parts]
    lengths = [np.asarray(cache.length) for cache in caches]
    firsts = np.cumsum([0, *map(len, lengths)])
    rows = [first + row for first, (_, taken) in zip(firsts, parts) for row in taken]
    row_B = np.asarray(rows + rows[-1:] * (n_rows - len(rows)), np.int32)
    runs = jax.tree.map(lambda *leaves: _taken(leaves, row_B, room), *[cache.runs for cache in caches])
    return Cache(runs, np.concatenate(lengths)[row_B])


# Which rows are taken is an argument: the sizes alone, all of them rounded, decide what is compiled.
@functools.partial(jax.jit, static_argnames=("room",))
def _taken(leaves, row_B, room: int):
    """Some rows of several [layers, B, H, M, K], counted through, with M = room."""
    whole = jnp.concatenate([_with_room(leaf, room) for leaf in leaves], axis=1)
    return jnp.take(whole, row_B, axis=1, mode="clip")


def _with_room(leaf, room: int):
    leaf = leaf[:, :, :, :room]
    return jnp.pad(leaf, ((0, 0), (0, 0), (0, 0), (0, room - leaf.shape[3]), (0, 0)))
