"""Data sets that TFDS prepared: rows of tokens used in place, or text.

The only module that imports tensorflow_datasets; it reads ArrayRecord files and needs no TensorFlow for that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tree_ffn.data.cache import ArrayRows, RowSource
from tree_ffn.data.documents import Segment, documents, segments
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import Inputs, OnStored, Source, content_hash, file_hash
from tree_ffn.data.tokenise import token_dtype
from tree_ffn.errors import InputError, reason

# A tfds.core.DatasetBuilder, whose decorated methods type checkers take for methods without arguments.
Builder = Any

# Splits of up to so many records are read into memory once: that takes some 30 us a record, and a random one
# later takes about 90 us.
IN_MEMORY_RECORDS = 1 << 16

TOKENS = "tokens"
VALID_SPLITS = ("valid", "validation")


def open_builder(spec: CorpusSpec) -> Builder:
    """The prepared data set that `data.tfds_dir` or `data.tfds_name` names.

    Raises:
      InputError: there is none, it was not prepared, or in another format.
    """
    builder = named_builder(spec) if spec.tfds_name else _directory_builder(spec.tfds_dir)
    where = _where(spec)
    if not builder.is_prepared():
        raise InputError(
            f"{where}: is not prepared under {builder.data_dir}; "
            "run python -m experiments.prepare_data with this config first."
        )
    file_format = builder.info.file_format
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"{where}: is kept as {file_format.value}; prepare it with file_format='array_record'."
        )
    if "train" not in builder.info.splits:
        raise InputError(f"{where}: has no split 'train', only {', '.join(builder.info.splits) or 'none'}.")
    return builder


def named_builder(spec: CorpusSpec) -> Builder:
    """The registered data set `data.tfds_name`, prepared or not."""
    try:
        return tfds.builder(spec.tfds_name, data_dir=spec.tfds_dir or None)
    except Exception as error:  # not found, a bad name, or code that needs TensorFlow
        raise InputError(
            f"data.tfds_name: {spec.tfds_name!r} cannot be found (some sets need TensorFlow); "
            "use a name that TFDS knows, or data.tfds_dir alone for a prepared directory."
        ) from error


def _directory_builder(directory: str) -> Builder:
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # no such file, broken JSON, unknown features
        raise InputError(
            f"data.tfds_dir: {directory!r} is not a prepared TFDS data set ({reason(error)}); "
            "use the directory with dataset_info.json."
        ) from error


def _where(spec: CorpusSpec) -> str:
    return f"data.tfds_name: {spec.tfds_name}" if spec.tfds_name else f"data.tfds_dir: {spec.tfds_dir}"


def split_names(builder: Builder) -> dict[str, str]:
    """Our splits and what the data set calls them; `valid` is missing if it has none."""
    valid = next((name for name in VALID_SPLITS if name in builder.info.splits), None)
    return {"train": "train"} | ({"valid": valid} if valid else {})


def has_tokens(builder: Builder, spec: CorpusSpec) -> bool:
    """Whether the records are rows of tokens; if not, they are text.

    Raises:
      InputError: they are neither.
    """
    features = builder.info.features
    if TOKENS not in features and spec.text_field not in features:
        raise InputError(
            f"data.text_field: {spec.text_field!r} is no feature of the data set; "
            f"use one of: {', '.join(features)}."
        )
    return TOKENS in features


def dataset_inputs(builder: Builder, spec: CorpusSpec) -> Inputs:
    """The files of a data set, hashed, and its text as streams of documents."""
    listing, sources = [], []
    splits = split_names(builder)
    for split, name in splits.items():
        info = builder.info.splits[name]
        kept = split if len(splits) > 1 else ""
        files = [Path(path) for path in info.filepaths]
        listing += [(path.name, file_hash(path), kept) for path in files]
        sources.append(Source(kept, info.num_examples, _reader(builder, name, spec)))
    return Inputs(builder.name, content_hash(listing), listing, sources, {})


def _reader(builder: Builder, split: str, spec: CorpusSpec):
    where = _where(spec)

    def read(on_stored: OnStored) -> Iterator[Segment]:
        records = builder.as_data_source(split)

        def pieces() -> Iterator[tuple[str, bool]]:
            for number in range(len(records)):
                yield from documents([_text(records, number, spec.text_field, where)])
                on_stored(number + 1)

        return segments(pieces())

    return read


def _text(records, number: int, field: str, where: str) -> str:
    try:
        text = records[number][field]
    except Exception as error:  # the readers raise RuntimeError, ValueError, IndexError and more
        raise damaged(where, error) from error
    try:
        return text if isinstance(text, str) else bytes(text).decode("utf-8")
    except (UnicodeDecodeError, TypeError) as error:
        raise InputError(f"{where}: record {number} has no UTF-8 text under {field!r}.") from error


def token_rows(builder: Builder, spec: CorpusSpec, row_tokens: int, vocab_size: int) -> dict[str, RowSource]:
    """Both splits of a data set of token rows, in place.

    Without a split of its own, `valid` is the last `valid_share` of the rows.

    Args:
      builder: of the data set.
      spec: names it, and says `valid_share`.
      row_tokens: C + 1.
      vocab_size: V, which no token may reach.

    Raises:
      InputError: the records cannot be read, or there are too few.
    """
    where, splits = _where(spec), split_names(builder)
    try:
        opened = {split: builder.as_data_source(name) for split, name in splits.items()}
        total = len(opened["train"])
    except Exception as error:
        raise damaged(where, error) from error
    rows = lambda split, *span: RecordRows(opened[split], row_tokens, vocab_size, where, *span)
    if "valid" in opened:
        found = {"train": rows("train"), "valid": rows("valid")}
    else:
        cut = total - max(1, int(total * spec.valid_share))
        found = {"train": rows("train", 0, cut), "valid": rows("train", cut, total)}
    if not all(len(source) for source in found.values()):
        raise InputError(f"{where}: has too few rows to train and validate; use a larger data set.")
    for source in found.values():
        source.rows(np.array([0, len(source) - 1]))  # a missing or cut-off file shows here, not hours later
    return {split: in_memory(source) for split, source in found.items()}


def in_memory(source: "RecordRows") -> RowSource:
    """The source itself if it is large, else all its rows in memory."""
    if len(source) > IN_MEMORY_RECORDS:
        return source
    rows = np.empty((len(source), source.row_tokens), token_dtype(source.vocab_size))
    for start in range(0, len(source), 4096):
        numbers = np.arange(start, min(start + 4096, len(source)))
        rows[numbers] = source.rows(numbers)
    return ArrayRows(rows)


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

    Args:
      records: token ids of each, [C + 1].
      row_tokens: C + 1.
      vocab_size: V, which no token may reach.
      where: what errors begin with.

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
