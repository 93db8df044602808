"""Plain, .gz, .xz and .zst files, read as one stream of bytes."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tree_ffn.errors import InputError, reason

SUFFIXES = (".gz", ".xz", ".zst")
_CHUNK = 1 << 20
_DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


def read_chunks(path: Path, on_stored: Callable[[int], None] = lambda position: None) -> Iterator[bytes]:
    """Yields the unpacked content of a file, about a megabyte at a time.

    Args:
      path: the file; its last suffix says how it is packed.
      on_stored: called with the position reached in the stored file, for
        progress.

    Raises:
      InputError: the file cannot be opened or unpacked; names the file.
    """
    try:
        with open(path, "rb") as stored:
            for chunk in _unpacked(stored, path.suffix):
                on_stored(stored.tell())
                yield chunk
    except _DAMAGE as error:
        raise InputError(f"{path}: cannot be unpacked ({reason(error)}); use an intact file.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use a readable file.") from error


def read_bytes(path: Path) -> bytes:
    """The whole unpacked content of a small file."""
    return b"".join(read_chunks(path))


def plain_name(path: Path) -> str:
    """The file's name without its packing: `train.txt.xz` -> `train.txt`."""
    return path.stem if path.suffix in SUFFIXES else path.name


def _unpacked(stored: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        return _zst_chunks(stored)
    stream = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile}.get(suffix, lambda fileobj: fileobj)
    opened = stream(fileobj=stored) if suffix == ".gz" else stream(stored)
    return iter(lambda: opened.read(_CHUNK), b"")


def _zst_chunks(stored: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader takes a truncated frame for a complete one."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{stored.name}: .zst files need the package zstandard; install it or use .xz, .gz or plain text."
        ) from error
    unpacker = None
    try:
        while chunk := stored.read(_CHUNK):
            while chunk:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                yield unpacker.decompress(chunk)
                chunk = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from error
    if unpacker is not None:
        raise EOFError("the file ends too early")
