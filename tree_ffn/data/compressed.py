"""Packed files (.gz, .xz, .zst, .bz2, .lzma) and plain ones, read as one stream of bytes."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tree_ffn.errors import InputError, check_not_pointer, reason

_CHUNK = 1 << 20
# What unpacking may hold of a file: zstd's largest window (--long=31), which a file of that kind may need.
_MOST_MEMORY = 2 << 30
# zstd unpacks what it is given at once; four bytes may become 128 KiB.
_ZST_CHUNK = 1 << 12


class _Damaged(Exception):
    """Why a file cannot be unpacked, in a few words."""


def read_chunks(path: Path, on_stored: Callable[[int], None] = lambda position: None) -> Iterator[bytes]:
    """Yields the unpacked content of a file, about a megabyte at a time.

    Args:
      path: the file; its last suffix says how it is packed.
      on_stored: called with the position reached in the stored file, for
        progress.

    Raises:
      InputError: the file cannot be opened or unpacked; names the file.
    """
    unpack = _UNPACKERS.get(path.suffix.lower())
    try:
        with open(path, "rb") as stored:
            beginning = stored.peek(64)
            check_not_pointer(str(path), beginning)
            if unpack and not beginning:
                raise _Damaged("it is empty")
            for chunk in unpack(stored) if unpack else iter(lambda: stored.read(_CHUNK), b""):
                on_stored(stored.tell() if stored.seekable() else 0)  # a pipe has no positions
                yield chunk
    except (_Damaged, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be unpacked ({reason(error)}); use an intact file.") from error
    except MemoryError as error:
        raise _too_large(path) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use a readable file.") from error


def read_bytes(path: Path) -> bytes:
    """The whole unpacked content of a small file."""
    return b"".join(read_chunks(path))


def plain_name(path: Path) -> str:
    """The file's name without its packing: `train.txt.xz` -> `train.txt`."""
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _gz(stored: BinaryIO) -> Iterator[bytes]:
    opened = gzip.GzipFile(fileobj=stored)
    return iter(lambda: opened.read(_CHUNK), b"")


def _xz(stored: BinaryIO) -> Iterator[bytes]:
    return _streams(stored, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY), padding=4)


def _lzma(stored: BinaryIO) -> Iterator[bytes]:
    return _streams(stored, lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MOST_MEMORY))


def _bz2(stored: BinaryIO) -> Iterator[bytes]:
    return _streams(stored, bz2.BZ2Decompressor)


def _streams(stored: BinaryIO, start: Callable[[], Any], padding: int = 0) -> Iterator[bytes]:
    """Streams one behind another; the standard library's readers end at what is broken behind the first.

    Args:
      stored: the file.
      start: makes a decompressor of one stream.
      padding: the zero bytes behind a stream come in multiples of it; 0: there are none.
    """
    unpacker, zeros, data = start(), 0, b""
    while data or (data := stored.read(_CHUNK)):
        if unpacker.eof:
            rest = data.lstrip(b"\0") if padding else data
            zeros += len(data) - len(rest)
            data = rest
            if not data:
                continue
            _check_padding(zeros, padding)
            unpacker, zeros = start(), 0
        try:
            yield unpacker.decompress(data, _CHUNK)
            while not (unpacker.eof or unpacker.needs_input):
                yield unpacker.decompress(b"", _CHUNK)
        except (lzma.LZMAError, OSError, ValueError) as error:  # the latter two are bz2's
            raise _damage(error) from error
        data = unpacker.unused_data
    if not unpacker.eof:
        raise EOFError("the file ends too early")
    _check_padding(zeros, padding)


def _check_padding(zeros: int, padding: int) -> None:
    if padding and zeros % padding:
        raise _Damaged(f"its padding of {zeros} bytes is no multiple of {padding}")


def _zst(stored: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader takes a truncated frame for a complete one."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{stored.name}: .zst files need the package zstandard; install it or use .xz, .gz or plain text."
        ) from error
    unpacker = None
    try:
        while chunk := stored.read(_ZST_CHUNK):
            while chunk:
                unpacker = (
                    unpacker or zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY).decompressobj()
                )
                yield unpacker.decompress(chunk)
                chunk = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise _damage(error) from error
    if unpacker is not None:
        raise EOFError("the file ends too early")


def _damage(error: Exception) -> Exception:
    return MemoryError() if "memory" in str(error).lower() else _Damaged(reason(error))


def _too_large(path: Path) -> InputError:
    return InputError(
        f"{path}: unpacking needs more memory than there is, or than the {_MOST_MEMORY >> 30} GiB that are "
        "allowed; pack it with a smaller window (that of zstd --long=31 is the largest)."
    )


_UNPACKERS = {
    ".gz": _gz, ".gzip": _gz, ".xz": _xz, ".lzma": _lzma, ".zst": _zst, ".zstd": _zst, ".bz2": _bz2,
}  # fmt: skip
SUFFIXES = tuple(_UNPACKERS)
