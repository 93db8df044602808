"""The safetensors format with nothing taken on trust: headers are checked, files written tensor by tensor.

    8 bytes    n, little endian
    n bytes    JSON {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...};
               "__metadata__" is text by name
    the rest   the tensors, one after the other without holes, C order, little endian

A header is believed only when the file has exactly the bytes that it describes, so nobody allocates what a
few bytes of header ask for. Source: the format's description, huggingface/safetensors, README.md.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_not_pointer
from tree_ffn.json_input import parse_json

# Bytes of an element. Those of one value in less than a byte are left out: nothing here could use them.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what is written
READ_FLOATS = FLOATS | {"F64": "float64"}
# Ten thousand tensors need about one MiB; reading JSON takes some ten times its size.
MAX_HEADER, MAX_DIMS = 4 * 2**20, 8


class Entry(NamedTuple):
    """What a header says of a tensor: dtype as in the file (`F32`), shape, and its bytes [begin, end) of
    the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


def read_header(path: str, field: str = "pretrained") -> dict[str, Entry]:
    """The tensors of a file, which is read no further than its header.

    Args:
      path: a safetensors file.
      field: the first word of an error's sentence.

    Returns:
      {name: Entry} in the order of the data.

    Raises:
      InputError: the file cannot be read, is cut off, or its header does not
        describe exactly the bytes that follow it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = directory + "/a.safetensors"
      ...     write(path, {"w": ("float32", (2, 3))}, lambda name: np.ones((2, 3), np.float32))
      ...     read_header(path)
      {'w': Entry(dtype='F32', shape=(2, 3), begin=0, end=24)}
    """
    return _read(path, field)[0]


def read_metadata(path: str, field: str = "pretrained") -> dict[str, str]:
    """The text by name (`__metadata__`) of a file; errors as of `read_header`."""
    return _read(path, field)[1]


def _read(path: str, field: str) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            check_not_pointer(f"{field}: {path!r}", n.to_bytes(8, "little") + file.read(32))
            file.seek(8)
            if size < 8 or n > size - 8:
                raise ValueError("it is cut off, or it is a file of another kind")
            if n > MAX_HEADER:
                raise ValueError(f"its header has {n} bytes, at most {MAX_HEADER} are allowed")
            text = file.read(n)
        header = parse_json(text, "its header", pairs=_without_repeats) if text.startswith(b"{") else None
        return _checked(header, size - 8 - n)
    except InputError as error:
        if str(error).startswith("its header"):
            error = InputError(f"{field}: {path!r} cannot be read as safetensors: {error}")
        raise error from None
    except OSError as error:
        raise InputError(f"{field}: {path!r} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{field}: {path!r} cannot be read as safetensors: {error}.") from None


def _checked(header, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of a header; ValueError says in a few words what is wrong with it."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not text by name")
    entries = {name: _entry(name, value) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    expected = 0
    for name, entry in entries.items():
        if entry.begin != expected:
            raise ValueError(f"{_short(name)} begins at byte {entry.begin}, not where it should, {expected}")
        expected = entry.end
    if expected != data_bytes:
        raise ValueError(f"its tensors need {expected} bytes, the file has {data_bytes}")
    return entries, metadata


def _without_repeats(pairs) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it has a name twice")
    return values


def _entry(name: str, value) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} lacks one of dtype, shape, data_offsets or has more")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{_short(name)} has an unknown dtype, {_short(str(dtype))}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the shape or the offsets of {_short(name)} are not sizes")
    begin, end = offsets
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != n_bytes:
        raise ValueError(
            f"{_short(name)} needs {n_bytes} bytes by its shape, its offsets give it {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(text: str) -> str:
    """Foreign text as a part of a sentence: on one line, and never long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def write(
    path: str,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file with one tensor in memory at a time.

    Args:
      path: the file.
      shapes: {name: (dtype, shape)}, dtypes of `FLOATS` values.
      tensor: gives the array of a name; called once a name, in order.
      metadata: text by name, into the header.

    Raises:
      OSError: the file cannot be written.
    """
    # Wide elements first, so that every tensor begins at a multiple of its element; the package orders alike.
    dtypes = {dtype: code for code, dtype in FLOATS.items()}
    names = sorted(shapes, key=lambda name: (-ITEM_BYTES[dtypes[shapes[name][0]]], name))
    header: dict = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtypes[dtype]]
        header[name] = {"dtype": dtypes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = np.asarray(tensor(name), order="C")
            assert (jnp.dtype(shapes[name][0]), shapes[name][1]) == (value.dtype, value.shape), name
            file.write(value.reshape(-1).view(np.uint8).data)
