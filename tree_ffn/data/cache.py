"""The cache directory: rows written, locked, and opened again."""

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tree_ffn.data.packing import SPLITS, Split, write_npy
from tree_ffn.data.sources import RecordRows, RowSource, damaged, foreign, in_memory, open_npy
from tree_ffn.errors import InputError, reason
from tree_ffn.progress import Progress

_RECORDS = "token_rows"

Log = Callable[[str], None]


def choose_format(name: str) -> str:
    """`auto` resolved: `array_record` where its packages are installed, else `memory`.

    Raises:
      InputError: `array_record` is asked for and they are not.
    """
    installed = all(importlib.util.find_spec(package) for package in ("tensorflow_datasets", "array_record"))
    if name == "array_record" and not installed:
        raise InputError(
            "data.format: 'array_record' needs the packages tensorflow-datasets and array-record; "
            "install them or use 'memory'."
        )
    return ("array_record" if installed else "memory") if name == "auto" else name


@contextlib.contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Turns what a file system refuses into one sentence that names the cache directory."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        what = error.strerror or reason(error)
        raise InputError(
            f"data.cache_dir: {cache} cannot be written ({what}); free space or name another."
        ) from error


def write_rows(
    directory: Path, splits: dict[str, Split], dtype: np.dtype, rows_format: str, log: Log
) -> None:
    """Writes both splits into an existing directory.

    Raises:
      InputError: there is not enough space.
      OSError: the file system refuses.
    """
    shapes = {name: (split.n_rows, split.row_tokens) for name, split in splits.items()}
    needed = sum(rows * row_tokens for rows, row_tokens in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if needed * 1.1 > free:
        raise InputError(
            f"data.cache_dir: {directory.parent.parent} has {free >> 20} MB free and the rows take "
            f"{needed >> 20} MB; free some space or name another."
        )
    with Progress("writing rows", sum(rows for rows, _ in shapes.values()), "row", log) as progress:
        blocks = {name: progress.along(split.rows()) for name, split in splits.items()}
        if rows_format == "memory":
            for name in splits:
                write_npy(directory / f"{name}.npy", blocks[name], shapes[name], dtype)
        else:
            _write_records(directory / _RECORDS, blocks, shapes["train"][1], dtype)


def _write_records(directory: Path, blocks: dict, row_tokens: int, dtype: np.dtype) -> None:
    from tree_ffn.data.builder import write_array_record

    try:
        write_array_record(directory, blocks, row_tokens, dtype)
    except (RuntimeError, ValueError) as error:  # how ArrayRecord's writer reports a failed write
        raise OSError(reason(error)) from error


def read_meta(path: Path, facts: dict) -> dict:
    """The description of prepared rows.

    Args:
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
    figures = [f"splits/{split}/{figure}" for split in SPLITS for figure in ("rows", "tokens", "bytes")]
    for key in [*facts, *figures, "bytes_per_token"]:
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


def open_rows(directory: Path, split: str, meta: dict) -> RowSource:
    """One split of a prepared directory.

    Raises:
      InputError: its files are missing, cut off or foreign.
    """
    if meta["format"] == "memory":
        shape = (meta["splits"][split]["rows"], meta["row_tokens"])
        return open_npy(directory / f"{split}.npy", shape, np.dtype(meta["dtype"]), meta["vocab_size"])
    import tensorflow_datasets as tfds

    where = f"data.cache_dir: {directory}"
    try:
        builder: Any = tfds.builder_from_directory(os.fspath(directory / _RECORDS))
        records = builder.as_data_source(split)
    except Exception as error:  # no such file, broken JSON, a format without its package
        raise damaged(where, error) from error
    source = RecordRows(records, meta["row_tokens"], meta["vocab_size"], where)
    return in_memory(source, np.dtype(meta["dtype"]))
