"""The options of routing, a table each: what scores experts, how the best are found, how gates are normed.

A new one is an entry here, and nothing elsewhere: specs, first weights, costs and tests read the tables.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Levels = list[jax.Array]


def of_leaves(logits_TR: jax.Array, n_trees: int, depth: int) -> Levels:
    """Experts are the leaves of trees. With r[n] the logit of node n, s the logistic function:

        log p(root) = 0,   log p(child of n) = log p(n) + log s(r[n]) to the right, log s(-r[n]) to the left

    Rows of the router, R, go level by level from the roots, in each level tree by tree.
    """
    n_tokens, end = logits_TR.shape[0], 0
    levels = [jnp.zeros((n_tokens, n_trees), jnp.float32)]
    for level in range(depth):
        start, end = end, end + n_trees * 2**level
        r = logits_TR[:, start:end]
        both = jnp.log1p(jnp.exp(-jnp.abs(r)))  # log s(r) = min(r, 0) - both
        sides = levels[-1][..., None] + jnp.minimum(jnp.stack([-r, r], axis=-1), 0.0) - both[..., None]
        levels.append(sides.reshape(n_tokens, 2 * (end - start)))
    return levels


def flat(logits_TX: jax.Array, n_trees: int, depth: int) -> Levels:
    """Every expert has a row of its own: log p = log softmax."""
    return [jax.nn.log_softmax(logits_TX, axis=-1)]


def leaves_against_load(logits_TR: jax.Array, bias_R: jax.Array, n_trees: int, depth: int) -> Levels:
    """What trees prefer where decisions are moved: log p of logits + bias."""
    return of_leaves(logits_TR + bias_R[None], n_trees, depth)


def flat_against_load(logits_TX: jax.Array, bias_X: jax.Array, n_trees: int, depth: int) -> Levels:
    """What a flat router prefers: p + bias (Wang et al. 2024, arXiv 2408.15664)."""
    return [jax.nn.softmax(logits_TX, axis=-1) + bias_X[None]]


class Router(NamedTuple):
    """What scores the experts.

    Attributes:
      log_p: (logits float32 [T, R], P, D) to the log probability of every node, a list of float32
        [T, nodes], the experts' last; None: a hash of the token's id names the expert.
      preferred: (logits, bias float32 [R], P, D) to what the choice goes by, where the load is balanced.
      rows: (X, P) to R, rows of weights.
      trees: experts are leaves of P trees, which a beam can search; rows have biases.
      trained: rows are parameters; or they stay as they were drawn.
    """

    log_p: Callable[[jax.Array, int, int], Levels] | None
    preferred: Callable[[jax.Array, jax.Array, int, int], Levels] | None
    rows: Callable[[int, int], int]
    trees: bool = False
    trained: bool = True


ROUTERS = {
    "tree": Router(
        of_leaves, leaves_against_load, lambda n_experts, n_trees: n_experts - n_trees, trees=True
    ),
    "softmax": Router(flat, flat_against_load, lambda n_experts, _: n_experts),
    "hash": Router(None, None, lambda *_: 0, trained=False),
    "random": Router(flat, flat_against_load, lambda n_experts, _: n_experts, trained=False),
}


def best(levels: Levels, top_k: int) -> jax.Array:
    """The K experts of the highest scores, from the best on; of equal ones the lower id."""
    return jax.lax.top_k(levels[-1], top_k)[1]


def beam(levels: Levels, top_k: int) -> jax.Array:
    """The K experts that a search finds which keeps the K likeliest nodes of every level; ascending."""
    first = next(i for i, level in enumerate(levels) if level.shape[1] >= top_k)
    kept_TK = jnp.sort(jax.lax.top_k(levels[first], top_k)[1], axis=1)
    for level in levels[first + 1 :]:
        # Ascending, so that of equal nodes the one of the lower number is kept.
        below = jnp.stack([2 * kept_TK, 2 * kept_TK + 1], axis=-1).reshape(kept_TK.shape[0], 2 * top_k)
        found = jax.lax.top_k(jnp.take_along_axis(level, below, axis=1), top_k)[1]
        kept_TK = jnp.sort(jnp.take_along_axis(below, found, axis=1), axis=1)
    return kept_TK


# log p [T, K] of the chosen to logarithms of gates: probabilities may underflow, their ratios do not.
GATE_NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda log_p: log_p,
    "l1": lambda log_p: jax.nn.log_softmax(log_p, axis=-1),
    "l2": lambda log_p: log_p - 0.5 * jax.nn.logsumexp(2 * log_p, axis=-1, keepdims=True),
    "rms": lambda log_p: GATE_NORMS["l2"](log_p) + 0.5 * math.log(log_p.shape[-1]),
}
