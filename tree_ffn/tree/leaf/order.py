"""The K best by score: NaN counts as the lowest, what was pruned is below it, ties go to the lower id."""

import jax
import jax.numpy as jnp


def comparable(score_TN: jax.Array, is_there_TN: jax.Array | None = None) -> jax.Array:
    """Scores without NaN: NaN and -inf become the least finite number, and what is not there becomes -inf.

    So the K best are all there, where at least K are.
    """
    least = jnp.finfo(score_TN.dtype).min
    score_TN = jnp.where(score_TN > least, score_TN, least)
    return score_TN if is_there_TN is None else jnp.where(is_there_TN, score_TN, -jnp.inf)


def best(score_TC: jax.Array, id_TC: jax.Array, n: int) -> jax.Array:
    """Which candidate is the best, the second, ... the n-th: bool [T, n, C]; ties go to the lower id.

    A candidate's rank is the number of those ahead of it: one pass of comparisons, where a sort makes many.

    Args:
      score_TC: of the candidates, e.g. `comparable`.
      id_TC: distinct numbers of a token's candidates.
      n: at most C.

    Example:
      >>> score, ids = jnp.array([[0.2, 0.7, 0.2, 0.9]]), jnp.array([[3, 2, 1, 0]])
      >>> best(score, ids, 3).astype(int).tolist()
      [[[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]]
    """
    one, other = (score_TC[:, :, None], id_TC[:, :, None]), (score_TC[:, None], id_TC[:, None])
    is_ahead_TCC = (other[0] > one[0]) | ((other[0] == one[0]) & (other[1] < one[1]))
    rank_TC = is_ahead_TCC.sum(axis=2, dtype=jnp.int32)
    return rank_TC[:, None] == jnp.arange(n, dtype=jnp.int32)[None, :, None]


def taken(value_TC: jax.Array, which_TnC: jax.Array) -> jax.Array:
    """Values of the candidates that `best` found: [T, n]."""
    return jnp.where(which_TnC, value_TC[:, None], 0).sum(axis=2, dtype=value_TC.dtype)
