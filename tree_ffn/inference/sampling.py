"""How the next token is chosen from its scores, for every row of a batch by a rule of its own."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_positive_int

# In place of a token, where the scores are NaN or infinite: there is none to choose.
NO_TOKEN = -1
# A temperature below the first would be 0 in float32, and one above the second no number.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rule of one sequence.

    Attributes:
      greedy: take the likeliest; the others are then not read.
      temperature: scores are divided by it.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens until their probabilities reach top_p.
      min_p: of those that are left, keep the tokens of at least min_p times the likeliest one's probability.

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(
                f"temperature: {self.temperature!r} is not allowed; use a number above 0 (or greedy)."
            )
        check_positive_int("top_k", self.top_k, least=0)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r} is not allowed; use a number above 0, at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p: {self.min_p!r} is not allowed; use a number from 0 to 1.")


class Rules(NamedTuple):
    """The rules of B rows as arrays: other values need no other program.

    Attributes:
      greedy_B: bool [B].
      temperature_B: float32 [B].
      top_k_B: int32 [B]; 0 keeps all.
      top_p_B, min_p_B: float32 [B].
    """

    greedy_B: np.ndarray
    temperature_B: np.ndarray
    top_k_B: np.ndarray
    top_p_B: np.ndarray
    min_p_B: np.ndarray


def rules(samplings: Sequence[Sampling]) -> Rules:
    """The rules of a batch's rows.

    Example:
      >>> rules([Sampling(), Sampling(top_k=3)]).top_k_B
      array([0, 3], dtype=int32)
    """
    return Rules(
        np.asarray([one.greedy for one in samplings]),
        np.asarray([min(max(one.temperature, SMALLEST), LARGEST) for one in samplings], np.float32),
        # No vocabulary is larger than int32 can count.
        np.asarray([min(one.top_k, 2**31 - 1) for one in samplings], np.int32),
        np.asarray([one.top_p for one in samplings], np.float32),
        np.asarray([one.min_p for one in samplings], np.float32),
    )


def keys(seeds: Sequence[int]) -> jax.Array:
    """One typed PRNG key a row, [B]; of each seed the last 32 bits count."""
    return _keys(np.asarray([seed % 2**32 for seed in seeds], np.uint32))


_keys = jax.jit(jax.vmap(jax.random.key))


def sample(logits_BV: jax.Array, key_B: jax.Array, place_B: jax.Array, by: Rules) -> jax.Array:
    """One token a row: int32 [B]; a row's token does not depend on the other rows.

    A row whose largest score is NaN or infinite (one is NaN or +inf, or all are -inf) gets `NO_TOKEN`.

    Args:
      logits_BV: float32 [B, V].
      key_B: typed PRNG keys of the whole sequences; greedy rows do not read theirs.
      place_B: int32 [B], the token's place in its sequence: each has a key of its own.
      by: the rules.
    """
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_finite_B = jnp.isfinite(logits_BV.max(axis=-1))

    def drawn():
        kept_BV = kept(logits_BV, by)
        key_of_place_B = jax.vmap(jax.random.fold_in)(key_B, place_B)
        token_B = jax.vmap(jax.random.categorical)(key_of_place_B, kept_BV).astype(jnp.int32)
        return jnp.where(by.greedy_B, likeliest_B, token_B)

    token_B = jax.lax.cond(jnp.all(by.greedy_B), lambda: likeliest_B, drawn)
    return jnp.where(is_finite_B, token_B, NO_TOKEN)


def kept(logits_BV: jax.Array, by: Rules) -> jax.Array:
    """The scores [B, V] that tokens are drawn from, -inf where one is left out.

    They are divided by the temperature; then top_k, top_p and min_p choose, each among what the former left.

    Sources: top_p, Holtzman et al. 2019, arXiv 1904.09751; min_p, Nguyen et al. 2024, arXiv 2407.01082.
    """
    # The largest becomes 0: however cold, a quotient is finite or -inf.
    tempered_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / by.temperature_B[:, None]
    narrow_B = (by.top_k_B > 0) | (by.top_p_B < 1)
    # Sorting a vocabulary is most of the work: done only where a row asks for it.
    left_BV = jax.lax.cond(
        jnp.any(narrow_B),
        lambda: jnp.where(narrow_B[:, None], _narrowed(tempered_BV, by), tempered_BV),
        lambda: tempered_BV,
    )
    return jnp.where(left_BV >= jnp.log(by.min_p_B)[:, None], left_BV, -jnp.inf)


def _narrowed(logits_BV, by):
    """The scores with -inf at the tokens that top_k and top_p leave out."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    n_tokens = logits_BV.shape[-1]
    k_B1 = jnp.where(by.top_k_B == 0, n_tokens, by.top_k_B)[:, None]
    sorted_BV = jnp.where(jnp.arange(n_tokens)[None] < k_B1, sorted_BV, -jnp.inf)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays if those before it have not reached top_p; the first always stays.
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    kept_BV = (before_BV < by.top_p_B[:, None]) & (sorted_BV > -jnp.inf)
    kept_BV = kept_BV | (jnp.arange(n_tokens) == 0)[None]
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
