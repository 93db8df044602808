"""Prepared rows: NumPy files in the cache directory, written once, opened again, and read by number."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from tree_ffn.data.packing import SPLITS, Split
from tree_ffn.errors import InputError, reason
from tree_ffn.progress import Progress

# Files up to this are read into memory once, and a random row then costs nothing.
IN_MEMORY_BYTES = 512 << 20

Log = Callable[[str], None]


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


def write_rows(directory: Path, splits: dict[str, Split], dtype: np.dtype, log: Log) -> None:
    """Writes both splits into an existing directory.

    Args:
      directory: of the cache, or below it.
      splits: by their names, which the files have too.
      dtype: of the tokens.
      log: takes lines on how far it is.

    Raises:
      InputError: there is not enough space.
      OSError: the file system refuses.
    """
    needed = sum(split.n_rows * split.row_tokens for split in splits.values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if needed * 1.1 > free:
        raise InputError(
            f"data.cache_dir: {directory.parent.parent} has {free >> 20} MB free and the rows take "
            f"{needed >> 20} MB; free some space or name another."
        )
    n_rows = sum(split.n_rows for split in splits.values())
    with Progress("writing rows", n_rows, "row", log) as progress:
        for name, split in splits.items():
            shape = (split.n_rows, split.row_tokens)
            write_npy(directory / f"{name}.npy", progress.along(split.rows()), shape, dtype)


def write_npy(path: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> None:
    """Writes rows as a NumPy file.

    In blocks by plain writes: on a full disk a memory map would kill the
    process instead of raising an error.

    Args:
      path: of the file.
      blocks: the rows, some at a time: [n, C + 1].
      shape: (R, C + 1), of all of them.
      dtype: of the tokens in the file.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).tobytes())


def read_meta(path: Path, facts: dict) -> dict:
    """The description of prepared rows.

    Args:
      path: of the file.
      facts: what it must say; a name may differ, for the same content may have moved.

    Raises:
      InputError: it cannot be read, lacks a key or describes other rows.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise foreign(path, f"cannot be read ({reason(error)})") from error
    if not isinstance(meta, dict):
        raise foreign(path, "holds no JSON object")
    counts = [f"splits/{split}/{count}" for split in SPLITS for count in ("rows", "tokens", "bytes")]
    for key in [*facts, *counts, "bytes_per_token"]:
        value = _at(meta, key.split("/"))
        if value is None:
            raise foreign(path, f"has no {key}")
        if key not in facts and not isinstance(value, int | float):
            raise foreign(path, f"has {key} {value!r}, which is no number")
        if key in ("row_tokens", "vocab_size", "dtype", "format") and value != facts[key]:
            raise foreign(path, f"has {key} {value!r}, not {facts[key]!r}")
    return meta


def _at(value, names: list[str]):
    """What lies under some names in nested dicts; None where there is nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def open_npy(path: Path, shape: tuple[int, int], dtype: np.dtype, vocab_size: int) -> ArrayRows:
    """Rows of a NumPy file: in memory and every id checked if small, else mapped.

    Args:
      path: of the file.
      shape: (R, C + 1), what it must hold.
      dtype: the same.
      vocab_size: V, which no token may reach.

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
