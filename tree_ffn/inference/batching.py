"""Sequences of different lengths that are continued together, joining and leaving between steps.

A prompt is read at its own length, padded to the right up to a power of two, and what stands there is not
attended to. From then on every row has a position of its own in a shared cache. Rows, lengths and room are
powers of two, so few programs are compiled.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import NotFinite, check_positive_int, not_finite
from tree_ffn.inference import decode
from tree_ffn.inference.penalties import Changes, changes
from tree_ffn.inference.request import Made, Request, program_of, read_together, rounded_top
from tree_ffn.inference.sampling import NO_TOKEN, Sampling, keys, rules
from tree_ffn.inference.scoring import TokenScores, token_scores
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Cache

__all__ = ["Batch", "Made", "Request", "generate"]

PLAIN = Sampling()

_prefill = jax.jit(decode.prefill, static_argnames=("spec", "n_top"))
_advance = jax.jit(decode.advance, static_argnames=("spec",), donate_argnames=("cache",))
_score = jax.jit(token_scores, static_argnames=("n_top",))


@dataclasses.dataclass
class _Row:
    """A request under way, and the tokens it has."""

    request: Request
    made: list[int] = dataclasses.field(default_factory=list)
    failed: NotFinite | None = None

    @property
    def done(self) -> bool:
        return self.failed is not None or len(self.made) >= self.request.n_tokens

    def fail(self) -> Made:
        """What is said of a row whose scores are NaN or infinite."""
        place = f"token {len(self.made)} after a " if self.request.n_tokens else ""
        self.failed = not_finite(f"{place}prompt of {len(self.request.prompt)}")
        return Made(self.request, None, None, None, last=True, failed=self.failed)


class _Chosen(NamedTuple):
    """What the device has been told to compute for every row."""

    token_B: jax.Array
    scores: TokenScores | None


class Batch:
    """Continues requests together: `add` them, then `step` until nothing is left.

    Args:
      spec, variables: as `decode.for_decoding` gives them.
      rows: the most sequences that are continued at once; others wait.

    Example:
      >>> from tree_ffn.models import DenseSpec, Transformer
      >>> spec = ModelSpec(vocab_size=9, max_seq_len=8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> variables = jax.jit(Transformer(spec).init)(jax.random.key(0), np.zeros((1, 8), np.int32))
      >>> batch = Batch(spec, variables)
      >>> for prompt in ((1, 2, 3), (4,)):
      ...     batch.add(Request(prompt, n_tokens=1))
      >>> [len(batch.step()) for _ in range(2)]
      [2, 0]
    """

    def __init__(self, spec: ModelSpec, variables: dict, rows: int = 8):
        check_positive_int("rows", rows)
        self.spec, self.variables, self.rows = spec, variables, rows
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[_Row | None] = []  # by row of the cache; None: nobody's
        self._cache: Cache | None = None
        self._by = ()  # keys and rules of the rows
        self._changes: Changes | None = None  # of their scores
        self._ahead: _Chosen | None = None  # the next step, already under way

    @property
    def requests(self) -> list[Request]:
        """Those that are under way, and those that wait."""
        return [row.request for row in self._running if row] + list(self._waiting)

    def __len__(self) -> int:
        return self._n_running + len(self._waiting)

    @property
    def _n_running(self) -> int:
        return sum(row is not None for row in self._running)

    def add(self, request: Request) -> None:
        """Lets a request wait for its first step; raises InputError if the model cannot do it."""
        request.check(self.spec)
        self._waiting.append(request)

    def drop(self, request: Request) -> None:
        """Forgets a request: what it would still be given is not wanted."""
        self._waiting = collections.deque(one for one in self._waiting if one is not request)
        self._running = [None if row and row.request is request else row for row in self._running]

    def step(self) -> list[Made]:
        """The next token of every request under way, and the first of those that now get a row.

        A request whose scores are NaN or infinite fails alone (`Made.failed`).
        """
        made = self._go_on() if self._n_running else []
        n_new = min(self.rows - self._n_running, len(self._waiting))
        new = [self._waiting.popleft() for _ in range(n_new)]
        parts = []
        for group in read_together(self.spec, new):
            first, rows, cache = self._read(group)
            made += first
            parts.append((cache, rows))
        self._rearrange(parts)
        return made

    def _read(self, group: list[Request]):
        """Reads prompts of one rounded length: (what was made, the rows that go on or None, their cache)."""
        length, n_top = program_of(self.spec, group[0])
        filled = group + [group[0]] * (decode.power_of_two(len(group), 1) - len(group))
        prompt_BC = np.zeros((len(filled), length), np.int32)
        for row, one in enumerate(filled):
            prompt_BC[row, : len(one.prompt)] = one.prompt
        length_B = np.asarray([len(one.prompt) for one in filled], np.int32)
        token_B, logits_BV, cache, prompt = _prefill(
            self.variables,
            prompt_BC,
            length_B,
            *_choice(filled),
            changes([(one.penalties, one.prompt, ()) for one in filled], self.spec.vocab_size),
            spec=self.spec,
            n_top=n_top,
        )
        rows: list[_Row | None] = [_Row(one) for one in group]
        made = self._tell(rows, self._scored(rows, token_B, logits_BV))
        if prompt is not None:
            made = [self._with_prompt(new, row, prompt, i) for i, (new, row) in enumerate(zip(made, rows))]
        return made, _under_way(rows), cache

    def _with_prompt(self, made: Made, row: _Row, scores: TokenScores, i: int) -> Made:
        """A row's first step with the scores of its prompt, if they are wanted and finite."""
        of_row = scores.at((i, slice(len(row.request.prompt) - 1)), row.request.n_top or 0)
        if made.failed or not of_row.is_finite:
            return made if made.failed else row.fail()
        return made._replace(prompt=of_row)

    def _go_on(self) -> list[Made]:
        """One step of the rows under way; where nothing will change, the device begins the next one."""
        chosen = self._ahead
        if chosen is None:
            latest = [row.made[-1] if row else 0 for row in self._running]
            chosen = self._advanced(np.asarray(latest, np.int32))
        self._ahead = self._advanced(chosen.token_B) if self._is_steady() else None
        made = self._tell(self._running, chosen)
        self._running = _under_way(self._running)
        return made

    def _is_steady(self) -> bool:
        """Whether the step after this one has the same rows."""
        rows = [row for row in self._running if row]
        none_joins = not self._waiting or len(rows) == self.rows
        none_leaves = all(len(row.made) + 1 < row.request.n_tokens for row in rows)
        return none_joins and none_leaves and decode.power_of_two(len(rows), 1) == len(self._running)

    def _advanced(self, token_B) -> _Chosen:
        token_B, logits_BV, self._cache, self._changes = _advance(
            self.variables, self._cache, token_B, *self._by, self._changes, spec=self.spec
        )
        return self._scored(self._running, token_B, logits_BV)

    def _scored(self, rows: list[_Row | None], token_B, logits_BV) -> _Chosen:
        """New tokens, with scores if any row wants them."""
        tops = [row.request.n_top for row in rows if row and row.request.n_top is not None]
        if not tops:
            return _Chosen(token_B, None)
        return _Chosen(token_B, _score(logits_BV, token_B, n_top=rounded_top(self.spec, max(tops))))

    def _tell(self, rows: list[_Row | None], chosen: _Chosen) -> list[Made]:
        """Gives the rows their new tokens, as soon as the device has them."""
        made, token_B = [], np.asarray(chosen.token_B).tolist()
        scores = jax.device_get(chosen.scores)
        for i, row in enumerate(rows):
            if row is None:
                continue
            row.made.append(token_B[i])
            one = row.request
            its_scores = None if scores is None or one.n_top is None else scores.at(i, one.n_top)
            if token_B[i] == NO_TOKEN or (its_scores and not its_scores.is_finite):
                made.append(row.fail())
            elif one.n_tokens == 0:
                made.append(Made(one, None, None, None, last=True))
            else:
                made.append(Made(one, token_B[i], its_scores, None, row.done))
        return made

    def _rearrange(self, parts) -> None:
        """Puts rows that join and rows under way into one cache; does nothing if that changes little."""
        joins = any(row for _, rows in parts for row in rows)
        n_rows = self._n_running
        if not joins and n_rows and decode.power_of_two(n_rows, 1) == len(self._running):
            return
        parts = [(self._cache, self._running), *parts]
        parts = [(cache, [(i, row) for i, row in enumerate(rows) if row]) for cache, rows in parts]
        parts = [(cache, rows) for cache, rows in parts if rows]
        rows = [row for _, rows in parts for _, row in rows]
        self._running, self._cache, self._ahead = rows, None, None
        if not rows:
            return
        n_rows = decode.power_of_two(len(rows), 1)
        self._running = rows + [None] * (n_rows - len(rows))
        need = max(len(row.request.prompt) + row.request.n_tokens for row in rows)
        room = min(decode.power_of_two(need), self.spec.max_seq_len)
        taken = [(cache, [i for i, _ in rows]) for cache, rows in parts]
        self._cache = join_caches(taken, n_rows, room)
        filled = [row or rows[-1] for row in self._running]
        self._by = _choice([row.request for row in filled])
        # The latest token is counted by the step that reads it.
        histories = [(row.request.penalties, row.request.prompt, row.made[:-1]) for row in filled]
        self._changes = changes(histories, self.spec.vocab_size)


def generate(
    spec: ModelSpec,
    variables: dict,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sampling: Sampling = PLAIN,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, continued together.

    Args:
      spec: the model.
      variables: its {"params", "routing"}.
      prompts: ids, of any lengths; together with the new tokens each fits the context.
      n_tokens: tokens to make.
      sampling: how they are chosen.
      seed: prompt i gets what seed + i gives it alone.
      stop_id: the token after which a sequence ends.

    Raises:
      InputError: names the argument, its value and what is allowed.
      NotFinite: the scores of a token are NaN or infinite.

    Example:
      >>> from tree_ffn.models import DenseSpec, Transformer
      >>> spec = ModelSpec(vocab_size=9, max_seq_len=8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> variables = jax.jit(Transformer(spec).init)(jax.random.key(0), np.zeros((1, 8), np.int32))
      >>> [len(tokens) for tokens in generate(spec, variables, [[1, 2, 3], [4]], n_tokens=5)]
      [5, 5]
    """
    batch = Batch(*decode.for_decoding(spec, variables), rows=max(1, len(prompts)))
    requests = [Request(tuple(ids), n_tokens, sampling, seed + i) for i, ids in enumerate(prompts)]
    tokens: dict[Request, list[int]] = {one: [] for one in requests}
    for one in requests:
        batch.add(one)
    while len(batch):
        for made in batch.step():
            tokens[made.request].append(made.checked().token)
            if made.token == stop_id:
                batch.drop(made.request)
    return list(tokens.values())


def _choice(requests: list[Request]):
    """Keys and sampling rules of a batch's rows, on the device: every step reads them."""
    return jax.device_put((keys([one.seed for one in requests]), rules([one.sampling for one in requests])))


def _under_way(rows: list[_Row | None]) -> list[_Row | None]:
    return [None if row is None or row.done else row for row in rows]


def join_caches(parts: Sequence[tuple[Cache, Sequence[int]]], n_rows: int, room: int) -> Cache:
    """One cache of the named rows of others, in their order.

    Args:
      parts: (cache with a length for every row, the rows to take), at least one row in each.
      n_rows: rows of the new cache; those beyond the named ones repeat the last.
      room: positions of the new cache, at least what the rows have filled.

    Example:
      >>> from tree_ffn.models.attention import KeyValue
      >>> leaf = jnp.arange(4.0).reshape(1, 2, 1, 2, 1)
      >>> cache = Cache((KeyValue(leaf, leaf),), jnp.asarray([2, 1]))
      >>> new = join_caches([(cache, [1])], n_rows=1, room=4)
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
