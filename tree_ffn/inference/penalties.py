"""Scores changed before a token is chosen: biases of tokens, and penalties for those seen before."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError

# A product or a quotient of a score stays far inside float32.
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0


@dataclasses.dataclass(frozen=True)
class Penalties:
    """The changes of one sequence, with the names of OpenAI's and vLLM's fields.

    Attributes:
      logit_bias: (token id, number) pairs; each number is added to the token's score, first of all.
      repetition_penalty: of tokens in the prompt or the new text, a score above 0 is divided by it and
        another one multiplied.
      frequency_penalty: is subtracted for every time a token stands in the new text.
      presence_penalty: is subtracted once from tokens of the new text.

    Raises:
      InputError: names the field, its value and what is allowed.

    Source: repetition_penalty, Keskar et al. 2019, arXiv 1909.05858.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}: {getattr(self, name)!r} is not allowed; use a finite number.")
        if not LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise InputError(
                f"repetition_penalty: {self.repetition_penalty!r} is not allowed; use a number from "
                f"{LEAST_REPETITION} to {MOST_REPETITION}."
            )
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise InputError(f"logit_bias: {bias!r} of token {token} is not allowed; use finite numbers.")


class Changes(NamedTuple):
    """The changes of B rows, and what they depend on.

    Attributes:
      presence_B, frequency_B, repetition_B: float32 [B].
      bias_BV: float32 [B, V].
      read_BV: bool [B, V], the tokens of the prompts.
      made_BV: int32 [B, V], how often a token was made.
    """

    presence_B: jax.Array
    frequency_B: jax.Array
    repetition_B: jax.Array
    bias_BV: jax.Array
    read_BV: jax.Array
    made_BV: jax.Array


def changes(
    rows: Sequence[tuple[Penalties, Sequence[int], Sequence[int]]], vocab_size: int
) -> Changes | None:
    """The changes of a batch; None, which costs nothing, if no row asks for any.

    Args:
      rows: (penalties, ids of the prompt, ids that were made) of each row.
      vocab_size: V.

    Example:
      >>> changes([(Penalties(), (1, 2), ())], 4) is None
      True
      >>> changes([(Penalties(presence_penalty=1.0), (1, 2), (2, 2))], 4).made_BV.tolist()
      [[0, 0, 2, 0]]
    """
    asked = [one for one, _, _ in rows]
    if all(one == Penalties() for one in asked):
        return None
    bias_BV = np.zeros((len(rows), vocab_size), np.float32)
    read_BV = np.zeros(bias_BV.shape, bool)
    made_BV = np.zeros(bias_BV.shape, np.int32)
    for i, (one, read, made) in enumerate(rows):
        read_BV[i, list(read)] = True
        made_BV[i] = np.bincount(np.asarray(made, np.int64), minlength=vocab_size)
        for token, bias in one.logit_bias:
            bias_BV[i, token] += bias
    presence_B, frequency_B, repetition_B = np.asarray(
        [(one.presence_penalty, one.frequency_penalty, one.repetition_penalty) for one in asked], np.float32
    ).T
    return jax.device_put(Changes(presence_B, frequency_B, repetition_B, bias_BV, read_BV, made_BV))


def counted(by: Changes, token_B: jax.Array) -> Changes:
    """The changes after one more token of each row was made."""
    rows = jnp.arange(len(token_B))
    return by._replace(made_BV=by.made_BV.at[rows, token_B].add(1))


def changed(logits_BV: jax.Array, by: Changes | None) -> jax.Array:
    """The scores after the changes, float32 [B, V]: bias, repetition, frequency, presence, in this order."""
    if by is None:
        return logits_BV
    logits_BV = logits_BV + by.bias_BV
    factor_BV = jnp.where(by.read_BV | (by.made_BV > 0), by.repetition_B[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / factor_BV, logits_BV * factor_BV)
    logits_BV = logits_BV - by.frequency_B[:, None] * by.made_BV.astype(jnp.float32)
    return jnp.where(by.made_BV > 0, logits_BV - by.presence_B[:, None], logits_BV)
