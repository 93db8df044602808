"""Rows by number, wherever they are kept."""

from pathlib import Path
from typing import Protocol

import numpy as np

from tree_ffn.errors import InputError, reason

# Splits up to these are read into memory once, and a random row then costs nothing. Reading takes next to no
# time from a NumPy file, and some 30 us a record from ArrayRecord; there a random row takes about 90 us.
IN_MEMORY_BYTES = 512 << 20
IN_MEMORY_RECORDS = 1 << 16


class RowSource(Protocol):
    """A split: `len(source)` rows of `row_tokens` tokens."""

    row_tokens: int

    def __len__(self) -> int: ...

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of some numbers, int32 [n, C + 1]."""
        ...


class ArrayRows:
    """Rows of an array or memory map [R, C + 1]."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.row_tokens = array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        return self.array[numbers].astype(np.int32)


class RecordRows:
    """Rows of a TFDS data source whose records hold `tokens`.

    Args:
      data_source: what `builder.as_data_source` gives.
      row_tokens: C + 1.
      vocab_size: V, which no token may reach.
      where: how errors call the data set.
      start, stop: the records to use.
    """

    def __init__(
        self,
        data_source,
        row_tokens: int,
        vocab_size: int,
        where: str,
        start: int = 0,
        stop: int | None = None,
    ):
        self.data_source, self.row_tokens, self.vocab_size, self.where = (
            data_source,
            row_tokens,
            vocab_size,
            where,
        )
        self.start = start
        self.length = (len(data_source) if stop is None else stop) - start

    def __len__(self) -> int:
        return self.length

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        records = [int(number) + self.start for number in numbers]
        try:
            rows = [record["tokens"] for record in self.data_source.__getitems__(records)]
        except Exception as error:  # the readers raise RuntimeError, ValueError, IndexError and more
            raise damaged(self.where, error) from error
        return checked_tokens(rows, self.row_tokens, self.vocab_size, self.where)


def checked_tokens(records: list, row_tokens: int, vocab_size: int, where: str) -> np.ndarray:
    """Records as rows, int32 [n, C + 1].

    Raises:
      InputError: they have another shape, or hold ids that the vocabulary does
        not have.
    """
    shape = next((np.shape(record) for record in records if np.shape(record) != (row_tokens,)), None)
    if shape is not None:
        raise InputError(
            f"{where}: records of shape {shape} do not fit; "
            f"model.max_seq_len + 1 = {row_tokens} tokens are needed."
        )
    rows = np.asarray(records).reshape(len(records), row_tokens)
    beyond = rows[(rows < 0) | (rows >= vocab_size)]
    if beyond.size:
        raise InputError(
            f"{where}: token id {beyond[0]} is not allowed; the vocabulary has 0 to {vocab_size - 1}."
        )
    return rows.astype(np.int32)


def damaged(where: str, error: Exception) -> InputError:
    """The sentence for records that cannot be read."""
    return InputError(f"{where}: cannot be read ({reason(error)}); delete it and prepare it again.")


def in_memory(source: RecordRows, dtype: np.dtype) -> RowSource:
    """The source itself if it is large, else all its rows in memory."""
    if len(source) > IN_MEMORY_RECORDS:
        return source
    rows = np.empty((len(source), source.row_tokens), dtype)
    for start in range(0, len(source), 4096):
        numbers = np.arange(start, min(start + 4096, len(source)))
        rows[numbers] = source.rows(numbers)
    return ArrayRows(rows)


def open_npy(path: Path, shape: tuple[int, int], dtype: np.dtype, vocab_size: int) -> ArrayRows:
    """Rows of a NumPy file: in memory and every id checked if small, else mapped.

    Raises:
      InputError: it is not such a file, not whole, or holds ids that the
        vocabulary does not have.
    """
    in_memory = path.exists() and path.stat().st_size <= IN_MEMORY_BYTES
    try:
        rows = np.load(path, mmap_mode=None if in_memory else "r")
    except (OSError, ValueError, EOFError) as error:
        raise foreign(path, f"cannot be read ({reason(error)})") from error
    if rows.shape != shape:
        raise foreign(path, f"has shape {rows.shape}, not {shape}")
    if rows.dtype != dtype:
        raise foreign(path, f"holds {rows.dtype}, not {dtype}")
    if in_memory and rows.max(initial=0) >= vocab_size:
        raise foreign(path, f"holds token id {rows.max()} and the vocabulary has 0 to {vocab_size - 1}")
    return ArrayRows(rows)


def foreign(path: Path, what: str) -> InputError:
    """The sentence for a file of a prepared directory that is not what was written there."""
    return InputError(f"{path}: {what}; delete its directory, it will be made again.")
