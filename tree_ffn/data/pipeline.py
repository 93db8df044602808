"""Which rows a step takes, and the batches made of them.

The order is a pure function of (seed, step): the step is all there is to save,
a run resumes anywhere, and two readers always agree.
"""

import importlib.util
from collections.abc import Iterable, Iterator

import numpy as np

from tree_ffn.data.cache import RowSource
from tree_ffn.errors import InputError, check_positive_int

# Of validation batches: every run sees the same rows, whatever its own seed.
_VALID_SEED = 0
_ROUNDS = 6
_LAST_STEP = 1 << 40


def row_order(seed: int, step: int, batch_size: int, n_rows: int) -> np.ndarray:
    """The rows of one step: `n_rows` in a new order each epoch, epochs end to end.

        position = step * B + j;   row = permutation(seed, position // R)(position % R)

    Args:
      seed: of the run.
      step: 0, 1, ...
      batch_size: B. A batch may end one epoch and begin the next.
      n_rows: R.

    Returns:
      int64 [B].

    Example:
      >>> sorted(row_order(seed=1, step=0, batch_size=5, n_rows=5).tolist())
      [0, 1, 2, 3, 4]
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch, index = position // n_rows, position % n_rows
    return permuted(index, seed, epoch, n_rows)


def permuted(index: np.ndarray, seed: int, epoch: np.ndarray, n: int) -> np.ndarray:
    """Where each index goes under the permutation of 0..n-1 of its (seed, epoch).

    A Feistel network on pairs (index // side, index % side), side^2 >= n,
    applied again while it leads outside 0..n-1 (Black & Rogaway, Ciphers with
    arbitrary finite domains, 2002). It needs no table of n entries, and unlike
    a library's shuffle it cannot change with the library's version.

    Args:
      index: int64, each below n.
      seed: of the run.
      epoch: int64, of the same shape.
      n: how many there are.
    """
    side = max(2, int(np.ceil(np.sqrt(n))))
    key = _mixed(_mixed(np.full(epoch.shape, seed % 2**64, np.uint64)) ^ epoch.astype(np.uint64))
    result = index.copy()
    outside = np.ones(index.shape, bool)
    while outside.any():
        high, low = np.divmod(result[outside], side)
        for round_number in range(_ROUNDS):
            noise = _mixed(key[outside] ^ _mixed((low * _ROUNDS + round_number).astype(np.uint64)))
            high, low = low, (high + (noise % np.uint64(side)).astype(np.int64)) % side
        result[outside] = high * side + low
        outside = result >= n
    return result


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that mixes them well: splitmix64 (Steele, Lea & Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Batches:
    """The training batches of a split.

    Args:
      source: the rows.
      batch_size: B.
      seed: of the order.
      workers: threads that read ahead in `iterate`, where grain is installed.
      here: positions in a batch of the rows that this process reads; all of them by default.

    Raises:
      InputError: B is not allowed, or the split is empty.

    Example:
      batch_BC = Batches(corpus.train, batch_size=8, seed=0).at(step)
    """

    def __init__(
        self, source: RowSource, batch_size: int, seed: int, workers: int = 2, here: np.ndarray | None = None
    ):
        check_positive_int("train.batch_size", batch_size)
        if not len(source):
            raise InputError("data: the split has no rows; use more text.")
        self.source, self.batch_size, self.seed, self.workers = source, batch_size, seed, workers
        self.here = np.arange(batch_size) if here is None else here

    def at(self, step: int) -> np.ndarray:
        """The rows of a step's batch that are read here, int32 [B, C + 1] where all are."""
        return self.source.rows(row_order(self.seed, step, self.batch_size, len(self.source))[self.here])

    def iterate(self, start_step: int = 0) -> Iterator[np.ndarray]:
        """`at(start_step)`, `at(start_step + 1)`, ... without end, read ahead by grain's threads."""
        if self.workers and importlib.util.find_spec("grain"):
            return self._read_ahead(start_step)
        return map(self.at, range(start_step, _LAST_STEP))

    def _read_ahead(self, start_step: int) -> Iterator[np.ndarray]:
        import grain

        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=4 * self.workers)
        steps = grain.MapDataset.range(start_step, _LAST_STEP)
        batches = iter(steps.map(self.at).to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()  # threads left open print tracebacks at exit


def valid_batches(source: RowSource, batch_size: int, n: int = 0) -> Iterator[np.ndarray]:
    """The first `n` batches of a fixed order of all rows, the same for every run and batch size.

    Args:
      source: the rows.
      batch_size: B.
      n: how many; 0, or more than there are, takes every row once.

    Yields:
      int32 [B, C + 1]; the last has the rows that are left, which may be fewer.
    """
    check_positive_int("train.batch_size", batch_size)
    check_positive_int("batches", n, least=0)
    return first_rows([source], n * batch_size if n else len(source), batch_size)


def first_rows(sources: Iterable[RowSource], n_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """The first rows of some sources, each in the fixed order of validation, in batches.

    Args:
      sources: read one after the other.
      n_rows: how many; fewer where there are not so many.
      batch_size: B.

    Yields:
      int32 [B, C + 1], fewer rows at the end of a source and of all.
    """
    for source in sources:
        wanted = min(n_rows, len(source))
        n_rows -= wanted
        for step in range(-(-wanted // batch_size)):
            order = row_order(_VALID_SEED, step, batch_size, len(source))
            yield source.rows(order[: wanted - step * batch_size])
