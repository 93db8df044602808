"""Log-likelihoods: of tokens, and of continuations, which question answering by a language model compares.

    log p(continuation | context) = sum_i log softmax(logits after token i - 1)[token i]

Rows of about one length run together, padded to one of a few lengths, so that few programs are compiled.
Padding stands on the right, where a causal model does not look. Only the continuations' positions are
turned into scores of all V tokens, those of all rows together, and so few at a time that their scores
stay in a processor's cache. The last token of a continuation is predicted and never read, so
continuations that differ in nothing else (all those of one token after one context) share a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_positive_int, not_finite
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Transformer, logits_of

# Positions whose scores of all tokens stand in memory at once: 128 of 50,257 are 26 MB.
CHUNK = 128


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

    @property
    def is_finite(self) -> bool:
        """Whether none of them is NaN or infinite."""
        return bool(np.isfinite(self.log_p).all() and np.isfinite(self.top_log_p).all())

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
    the last `spec.max_seq_len` of its tokens but one.

    Args:
      spec: the model.
      variables: its {"params", "routing"}.
      pairs: neither part is empty; a continuation fits the context.
      batch_tokens: about how many tokens run at once, padding among them.
      progress: called with the number of pairs of every finished batch.

    Raises:
      InputError: a pair has an empty part or an id outside the vocabulary, or a
        continuation is longer than the context.
      NotFinite: names the pair whose log-probability is NaN or infinite.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> spec = ModelSpec(vocab_size=9, max_seq_len=8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> variables = jax.jit(Transformer(spec).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      >>> [found] = score(spec, variables, [([1, 2, 3], [4])])
      >>> found.log_likelihood < 0
      True
    """
    check_positive_int("batch_tokens", batch_tokens)
    # As fast here, and the program of every length is soon compiled.
    spec = dataclasses.replace(spec, unroll=1)
    rows = _rows(spec, pairs)
    found: dict[int, Scored] = {}
    sizes = [(len(row.read), row.n_targets) for row in rows]
    for batch, shape in batches(sizes, spec.max_seq_len, batch_tokens):
        n_before, members = len(found), [rows[i] for i in batch]
        log_p_N, is_best_N = jax.device_get(_score(variables, *_arrays(members, *shape), spec=spec))
        start = 0
        for i, targets in ((i, targets) for row in members for i, targets in row.targets.items()):
            mine = slice(start, start + len(targets))
            if not np.isfinite(log_p_N[mine]).all():
                raise not_finite(f"pair {i}: continuation of {len(targets)} tokens")
            found[i] = Scored(float(log_p_N[mine].sum(dtype=np.float64)), bool(is_best_N[mine].all()))
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
      indices of at most B rows, and (B, C, N): rows, positions, and room for tokens to predict.

    Example:
      >>> list(batches([(5, 1), (40, 2), (7, 1)], context=64, batch_tokens=96))
      [([1], (1, 48, 128)), ([2, 0], (2, 32, 128))]
    """
    chunks = lambda n_targets: -(-n_targets // CHUNK) * CHUNK
    by_length: dict[int, list[int]] = {}
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        by_length.setdefault(rounded(sizes[i][0], 32, context), []).append(i)
    for length, members in by_length.items():
        n_rows = max(1, min(batch_tokens // length, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), n_rows):
            batch = members[start : start + n_rows]
            # Room costs nothing but its memory: the chunks that are computed are those that are filled. So
            # there is room for every position, or more where one-token continuations share their rows, and
            # the rows' length alone decides what is compiled.
            yield batch, (n_rows, length, chunks(max(n_rows * length, sum(sizes[i][1] for i in batch))))


def rounded(size: int, least: int, most: int) -> int:
    """The next of few sizes: least * 2^n, or half as much again; `most` at most.

    Args:
      size: what has to find room.
      least: the smallest size.
      most: the largest.

    Example:
      >>> [rounded(size, 32, 500) for size in (3, 33, 50, 65, 129, 300, 400)]
      [32, 48, 64, 96, 192, 384, 500]
    """
    at = least
    while at < size:
        if size <= at * 3 // 2:
            at = at * 3 // 2
            break
        at *= 2
    return min(at, most)


def _rows(spec: ModelSpec, pairs) -> list[_Row]:
    """One for pairs that read the same tokens."""
    rows: dict[tuple[int, ...], _Row] = {}
    for i, (context, continuation) in enumerate(pairs):
        read = _read(spec, i, context, continuation)
        rows.setdefault(read, _Row(read, {})).targets[i] = list(continuation)
    return list(rows.values())


def _read(spec: ModelSpec, i: int, context, continuation) -> tuple[int, ...]:
    """What is read of a pair: all that fits, but its last token."""
    whole = [*context, *continuation]
    if not (len(context) and len(continuation)):
        raise InputError(
            f"pair {i}: its context or its continuation is empty; each needs at least one token."
        )
    if len(continuation) > spec.max_seq_len:
        raise InputError(
            f"pair {i}: a continuation of {len(continuation)} tokens does not fit the model's context of "
            f"{spec.max_seq_len}; score it in windows."
        )
    if not 0 <= min(whole) <= max(whole) < spec.vocab_size:
        raise InputError(f"pair {i}: its ids are not all below the vocabulary's {spec.vocab_size}.")
    return tuple(whole[-spec.max_seq_len - 1 : -1])


def _arrays(rows: list[_Row], n_rows: int, length: int, room: int):
    """token_BC, and of the targets place_N in the flattened tokens, target_N and how many there are."""
    token_BC = np.zeros((n_rows, length), np.int32)
    places, wanted = [], []
    for b, row in enumerate(rows):
        token_BC[b, : len(row.read)] = row.read
        # Weights of 0 would not keep what another token overflows to out of this row.
        token_BC[b, len(row.read) :] = row.read[-1]
        end = b * length + len(row.read)
        for targets in row.targets.values():
            places += range(end - len(targets), end)
            wanted += targets
    place_N, target_N = np.zeros((2, room), np.int32)
    place_N[: len(places)], target_N[: len(wanted)] = places, wanted
    return token_BC, place_N, target_N, np.int32(len(wanted))


@functools.partial(jax.jit, static_argnames=("spec",))
def _score(variables, token_BC, place_N, target_N, n, *, spec: ModelSpec):
    """Log-probability of the first n targets, and whether it is the likeliest token: [N] each."""
    x_BCE, _ = Transformer(spec).apply(variables, token_BC, states=True)
    x_NE = jnp.take(x_BCE.reshape(-1, spec.width), place_N, axis=0, mode="clip")

    def one(i, found):
        at = i * CHUNK
        x_kE, target_k = (jax.lax.dynamic_slice_in_dim(array, at, CHUNK) for array in (x_NE, target_N))
        logits_kV = logits_of(spec, variables["params"], x_kE[None])[0]
        put = lambda all_N, new_k: jax.lax.dynamic_update_slice_in_dim(all_N, new_k, at, 0)
        return jax.tree.map(put, found, _compare(logits_kV, target_k))

    empty = (jnp.zeros(place_N.shape, jnp.float32), jnp.zeros(place_N.shape, bool))
    return jax.lax.fori_loop(0, (n + CHUNK - 1) // CHUNK, one, empty)


def _compare(logits_kV, target_k):
    """log softmax(logits)[target], and whether it is the first of the likeliest tokens: [k] each."""
    best_k, own_k = logits_kV.max(axis=-1), _at(logits_kV, target_k)
    total_k = jnp.exp(logits_kV - best_k[:, None]).sum(axis=-1)

    def is_first():
        before_kV = jnp.arange(logits_kV.shape[1])[None] < target_k[:, None]
        return ~jnp.any(before_kV & (logits_kV == best_k[:, None]), axis=-1)

    is_best_k = own_k == best_k
    # An argmax would be one more slow pass over all scores, and mostly no target is the best.
    is_first_k = jax.lax.cond(jnp.any(is_best_k), is_first, lambda: is_best_k)
    return own_k - best_k - jnp.log(total_k), is_best_k & is_first_k


def _at(logits_V, tokens):
    """The scores of tokens, [...]."""
    return jnp.take_along_axis(logits_V, tokens[..., None], axis=-1, mode="clip")[..., 0]
