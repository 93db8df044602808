"""Log-likelihoods: of tokens, and of continuations, which question answering by a language model compares.

    log p(continuation | context) = sum_i log softmax(logits after token i - 1)[token i]

Rows of about one length run together, padded to one of a few lengths, so that few programs are compiled.
Padding stands on the right, where a causal model does not look, and only the continuation's positions
are turned into scores of all V tokens. The last token of a continuation is predicted and never read, so
continuations that differ in nothing else (all those of one token after one context) share a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Transformer


class Scored(NamedTuple):
    """What a model says of one continuation.

    Attributes:
      log_likelihood: in nats.
      is_greedy: whether every token of it is the likeliest one where it stands.
    """

    log_likelihood: float
    is_greedy: bool


class TokenScores(NamedTuple):
    """Log-probabilities at some positions, in nats.

    Attributes:
      log_p: float32 [...], of the token that stands there.
      top_ids: int32 [..., K], the K likeliest tokens, likeliest first.
      top_log_p: float32 [..., K].
    """

    log_p: jax.Array
    top_ids: jax.Array
    top_log_p: jax.Array

    def at(self, where, n_top: int | None = None) -> "TokenScores":
        """Those of some positions (any index), with the `n_top` likeliest (all of them by default)."""
        log_p, ids, top = (np.asarray(leaf)[where] for leaf in self)
        return TokenScores(log_p, ids[..., :n_top], top[..., :n_top])


class _Row(NamedTuple):
    """Tokens that are read, and by pair what the last of them have to predict."""

    read: tuple[int, ...]
    targets: dict[int, list[int]]

    @property
    def n_targets(self) -> int:
        return sum(map(len, self.targets.values()))


def score(
    spec: ModelSpec,
    variables: dict,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int = 8192,
    progress: Callable[[int], object] | None = None,
) -> list[Scored]:
    """Scores every (context, continuation) pair of token ids.

    A pair that is too long loses the left end of its context: the model reads
    the last `spec.context` of its tokens but one.

    Args:
      spec, variables: the model.
      pairs: neither part is empty; a continuation fits the context.
      batch_tokens: about how many tokens run at once, padding among them.
      progress: called with the number of pairs of every finished batch.

    Raises:
      InputError: a pair has an empty part or an id outside the vocabulary, or a
        continuation is longer than the context.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> spec = ModelSpec(vocab_size=9, context=8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> variables = Transformer(spec).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      >>> [found] = score(spec, variables, [([1, 2, 3], [4])])
      >>> found.log_likelihood < 0
      True
    """
    check_positive_int("batch_tokens", batch_tokens)
    rows = _rows(spec, pairs)
    found: dict[int, Scored] = {}
    sizes = [(len(row.read), row.n_targets) for row in rows]
    for batch, shape in batches(sizes, spec.context, batch_tokens):
        n_before, members = len(found), [rows[i] for i in batch]
        log_p_BK, is_best_BK = jax.device_get(_score(variables, *_arrays(members, *shape), spec=spec))
        for row, log_p_K, is_best_K in zip(members, log_p_BK, is_best_BK):
            start = 0
            for i, targets in row.targets.items():
                mine = slice(start, start + len(targets))
                found[i] = Scored(float(log_p_K[mine].sum(dtype=np.float64)), bool(is_best_K[mine].all()))
                start = mine.stop
        if progress is not None:
            progress(len(found) - n_before)
    return [found[i] for i in range(len(pairs))]


def token_scores(logits_V: jax.Array, tokens: jax.Array, n_top: int) -> TokenScores:
    """log softmax(logits) at the tokens that followed, and its K largest values.

    Args:
      logits_V: float32 [..., V].
      tokens: int32 [...], below V.
      n_top: K, at most V.

    Example:
      >>> found = token_scores(jnp.log(jnp.asarray([[0.5, 0.25, 0.25]])), jnp.asarray([1]), n_top=1)
      >>> found.top_ids.tolist(), (found.log_p / jnp.log(0.5)).round(3).tolist()
      ([[0]], [2.0])
    """
    top, ids = jax.lax.top_k(logits_V, n_top)
    log_z = jax.nn.logsumexp(logits_V, axis=-1)
    return TokenScores(_at(logits_V, tokens) - log_z, ids.astype(jnp.int32), top - log_z[..., None])


def batches(sizes: Sequence[tuple[int, int]], context: int, batch_tokens: int):
    """Rows that run together, longest first, and the shape they run in.

    Args:
      sizes: (tokens read, tokens predicted) of every row.
      context: the longest row there can be.
      batch_tokens: about how many tokens run at once.

    Yields:
      indices of at most B rows, and (B, C, K): rows, positions, and positions to score.

    Example:
      >>> list(batches([(5, 1), (40, 2), (7, 1)], context=64, batch_tokens=96))
      [([1], (1, 48, 4)), ([2, 0], (2, 32, 4))]
    """
    shapes = [(rounded(read, 32, context), rounded(targets, 4, context, 4)) for read, targets in sizes]
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(sizes)), key=lambda i: (shapes[i], sizes[i]), reverse=True):
        by_shape.setdefault(shapes[i], []).append(i)
    for (length, n_targets), members in by_shape.items():
        n_rows = max(1, min(batch_tokens // length, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), n_rows):
            yield members[start : start + n_rows], (n_rows, length, n_targets)


def rounded(size: int, least: int, most: int, factor: int = 2) -> int:
    """The next of few sizes: least * factor^n, or (factor 2) half as much again; `most` at most.

    Example:
      >>> [rounded(size, 32, 500) for size in (3, 33, 50, 65, 129, 300, 400)]
      [32, 48, 64, 96, 192, 384, 500]
    """
    at = least
    while at < size:
        if factor == 2 and size <= at * 3 // 2:
            return min(at * 3 // 2, most)
        at *= factor
    return min(at, most)


def _rows(spec: ModelSpec, pairs) -> list[_Row]:
    """One for pairs that read the same tokens, up to as many targets as the context has positions."""
    rows: list[_Row] = []
    latest: dict[tuple[int, ...], _Row] = {}
    for i, (context, continuation) in enumerate(pairs):
        read = _read(spec, i, context, continuation)
        if read not in latest or latest[read].n_targets + len(continuation) > spec.context:
            latest[read] = _Row(read, {})
            rows.append(latest[read])
        latest[read].targets[i] = list(continuation)
    return rows


def _read(spec: ModelSpec, i: int, context, continuation) -> tuple[int, ...]:
    """What is read of a pair: all that fits, but its last token."""
    whole = [*context, *continuation]
    if not (len(context) and len(continuation)):
        raise InputError(
            f"pair {i}: its context or its continuation is empty; each needs at least one token."
        )
    if len(continuation) > spec.context:
        raise InputError(
            f"pair {i}: a continuation of {len(continuation)} tokens does not fit the model's context of "
            f"{spec.context}; score it in windows."
        )
    if not 0 <= min(whole) <= max(whole) < spec.vocab_size:
        raise InputError(f"pair {i}: its ids are not all below the vocabulary's {spec.vocab_size}.")
    return tuple(whole[-spec.context - 1 : -1])


def _arrays(rows: list[_Row], n_rows: int, length: int, n_targets: int):
    """token_BC, position_BK and target_BK; zeros where there is nothing."""
    token_BC = np.zeros((n_rows, length), np.int32)
    position_BK = np.zeros((n_rows, n_targets), np.int32)
    target_BK = np.zeros((n_rows, n_targets), np.int32)
    for b, row in enumerate(rows):
        token_BC[b, : len(row.read)] = row.read
        at = [p for targets in row.targets.values() for p in range(-len(targets), 0)]
        position_BK[b, : len(at)] = len(row.read) + np.asarray(at)
        target_BK[b, : len(at)] = [token for targets in row.targets.values() for token in targets]
    return token_BC, position_BK, target_BK


@functools.partial(jax.jit, static_argnames=("spec",))
def _score(variables, token_BC, position_BK, target_BK, *, spec: ModelSpec):
    """Log-probability of every target, and whether it is the likeliest: [B, K] each."""
    logits_BKV, _ = Transformer(spec).apply(variables, token_BC, only=position_BK)
    log_p_BK = _at(logits_BKV, target_BK) - jax.nn.logsumexp(logits_BKV, axis=-1)
    return log_p_BK, jnp.argmax(logits_BKV, axis=-1) == target_BK


def _at(logits_V, tokens):
    """The scores of tokens, [...]."""
    return jnp.take_along_axis(logits_V, tokens[..., None], axis=-1, mode="clip")[..., 0]
