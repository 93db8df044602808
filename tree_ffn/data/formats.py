"""What a file holds, by its name: one table for every program that reads text.

Names count without their packing, and large letters as small ones. A name that is in no table is plain text.
"""

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tree_ffn.data.compressed import SUFFIXES, plain_name, read_chunks
from tree_ffn.errors import InputError, check_not_pointer, reason
from tree_ffn.json_input import check_characters, json_values, other_encoding

TEXT, JSON, PARQUET = "text", "JSON", "parquet"
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".ldjson", ".jsonlines", ".json"), JSON),
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
}
# What is none of these, and what to do.
_REFUSED = {
    "is a table; write its texts as JSON lines (.jsonl)":
        ".csv .tsv .xls .xlsx .ods .arrow .feather .orc .avro .sqlite .sqlite3 .db",
    "is a document with a layout; save its text as .txt":
        ".pdf .doc .docx .odt .rtf .ppt .pptx .epub .mobi .djvu",
    "holds numbers, no text; name the text that they were made from":
        ".npy .npz .bin .idx .h5 .hdf5 .pkl .pickle .pth .ckpt .safetensors .gguf .tfrecord .tfrecords "
        ".array_record .arrayrecord .riegeli .mds .msgpack",
    "is an archive; unpack it (.gz, .xz, .zst, .bz2 and .lzma of one file are read)":
        ".zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .lz4 .lz .lzo .br .sz .snappy .z .warc .wet .wat",
    "is packed twice; unpack it once": " ".join(SUFFIXES),
}  # fmt: skip
_ADVICE = {suffix: advice for advice, suffixes in _REFUSED.items() for suffix in suffixes.split()}
# What Windows' editors put before a text; files that were joined have it within.
_MARK = re.compile(r"^\ufeff+", re.MULTILINE)
_PARQUET_ROWS = 1024
# A header of tar has so many bytes, most of them 0; half of UTF-16 without a mark is, too.
_LOOKED_AT = 512

OnStored = Callable[[int], None]


def kind_of(path: Path, where: str | None = None) -> str:
    """TEXT, JSON or PARQUET.

    Args:
      path: of the file, which is not opened.
      where: what an error begins with; by default the path.

    Raises:
      InputError: the name says that it is no text; says what to do.

    Example:
      >>> kind_of(Path("c4.00001.JSON.gz")), kind_of(Path("Makefile"))
      ('JSON', 'text')
    """
    suffix = Path(plain_name(path)).suffix.lower()
    if advice := _ADVICE.get(suffix):
        raise InputError(f"{where or path}: {suffix} {advice}.")
    packing = path.suffix.lower()
    kind = KINDS.get(suffix, TEXT)
    if kind == PARQUET and packing in SUFFIXES:
        raise InputError(f"{where or path}: {packing} around parquet, which is packed in itself; unpack it.")
    return kind


def decoded(chunks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Chunks of UTF-8 as chunks of text; a byte order mark where a line begins is no text.

    Raises:
      InputError: a byte is not UTF-8; names the file and the byte's offset. Or it is no text at all.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, line_begins = 0, True
    for chunk in itertools.chain(chunks, [b""]):
        held = len(decoder.getstate()[0])
        if position == 0 and (encoding := other_encoding(chunk)):
            raise InputError(f"{path}: is {encoding}; save it as UTF-8.")
        if position == 0 and chunk[:_LOOKED_AT].count(0) > max(2, len(chunk[:_LOOKED_AT]) // 4):
            raise InputError(
                f"{path}: is no text (many bytes are 0, as in UTF-16 or archives); use UTF-8 text."
            )
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = position - held + error.start
            raise InputError(f"{path}: byte {offset} is not UTF-8; use UTF-8 text.") from error
        position += len(chunk)
        if "\ufeff" in text:
            text = _MARK.sub("", text if line_begins else f" {text}")[0 if line_begins else 1 :]
        if text:
            line_begins = text.endswith("\n")
            yield text


def read_text(path: Path, where: str | None = None) -> str:
    """The whole text of a small file.

    Raises:
      InputError: it is no plain text, or cannot be read.
    """
    if (kind := kind_of(path, where)) != TEXT:
        raise InputError(f"{where or path}: is {kind}; use plain text.")
    return "".join(decoded(read_chunks(path), path))


def read_rows(
    path: Path, where: str, fields: Iterable[str] | None = None, on_stored: OnStored = lambda position: None
) -> Iterator[tuple[str, object]]:
    """The rows of a file of JSON (lines or an array) or of parquet.

    Args:
      path: of the file.
      where: what errors begin with: the file, and who named it.
      fields: those to read of parquet; None is all.
      on_stored: called with the position reached in the stored file.

    Yields:
      (place, row): where the row is, as a beginning for errors, and its value: an object (dict), or in JSON
      any other value.

    Raises:
      InputError: it is another kind of file, or cannot be read.
    """
    kind = kind_of(path, where)
    if kind == TEXT:
        raise InputError(f"{where}: is plain text; use JSON lines (.jsonl) or parquet, packed or not.")
    if kind == PARQUET:
        yield from _parquet_rows(path, where, fields, on_stored)
        return
    for line, value in json_values(decoded(read_chunks(path, on_stored), path), where):
        yield f"{where}, line {line}", value


def read_objects(path: Path, where: str) -> Iterator[tuple[str, dict]]:
    """`read_rows` of a file whose rows are all objects.

    Raises:
      InputError: one is none.
    """
    for place, row in read_rows(path, where):
        if not isinstance(row, dict):
            raise InputError(f"{place}: no JSON object.")
        yield place, row


def text_under(place: str, row: object, field: str) -> str | None:
    """The text that a row has under a field; None if there is none.

    Args:
      place: where the row is, for the error.
      row: of `read_rows`; any JSON value.
      field: name of the field.

    Raises:
      InputError: it holds half of a surrogate pair.
    """
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        return None
    check_characters(value, f"{place}: {field!r}")
    return value


def _parquet_rows(
    path: Path, where: str, fields: Iterable[str] | None, on_stored: OnStored
) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{where}: parquet needs the package pyarrow; "
            "`pip install 'tree_ffn[parquet]'` brings it, or use JSON lines."
        ) from error
    number = 0
    try:
        with open(path, "rb") as file:
            check_not_pointer(where, file.read(40))
        with pyarrow.parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            for field in fields or ():
                if field not in known:
                    raise InputError(f"{where}: has no column {field!r}; its columns are {', '.join(known)}.")
            columns = None if fields is None else list(fields)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{where}, row {number}", row
                on_stored(path.stat().st_size * number // file.metadata.num_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{where}: cannot be read as parquet ({reason(error)}).") from error
