"""Headers of safetensors files as the package checks them, and files written tensor by tensor.

    8 bytes    n, little endian
    n bytes    JSON {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...};
               "__metadata__" is text by name
    the rest   the tensors, one after the other without holes, C order, little endian

The package believes a header only when the file has exactly the bytes that it describes, so nobody allocates
what a few bytes of header ask for. Source: the format's description, huggingface/safetensors, README.md.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_not_pointer, reason

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what is written
READ_FLOATS = FLOATS | {"F64": "float64"}
# Ten thousand tensors need about one MiB; reading JSON takes some ten times its size.
MAX_HEADER, MAX_DIMS = 4 * 2**20, 8


class Entry(NamedTuple):
    """What a header says of a tensor: dtype as in the file (`F32`), and shape."""

    dtype: str
    shape: tuple[int, ...]


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
      {'w': Entry(dtype='F32', shape=(2, 3))}
    """
    return _read(path, field)[0]


def read_metadata(path: str, field: str = "pretrained") -> dict[str, str]:
    """The text by name (`__metadata__`) of a file; errors as of `read_header`."""
    return _read(path, field)[1]


def _read(path: str, field: str) -> tuple[dict[str, Entry], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    unreadable = f"{field}: {path!r} cannot be read as safetensors:"
    try:
        with open(path, "rb") as start:
            beginning = start.read(40)
        check_not_pointer(f"{field}: {path!r}", beginning)
        if (n := int.from_bytes(beginning[:8], "little")) > MAX_HEADER:
            raise InputError(
                f"{unreadable} it is a file of another kind, or its header has {n} bytes and at most "
                f"{MAX_HEADER} are allowed."
            )
        with safe_open(path, framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: Entry(one.get_dtype(), tuple(one.get_shape())) for name, one in parts.items()}
            metadata = file.metadata() or {}
    except OSError as error:
        raise InputError(f"{field}: {path!r} cannot be read: {reason(error)}.") from None
    except SafetensorError as error:
        raise InputError(f"{unreadable} {reason(error)[:200]}.") from None
    if any(len(entry.shape) > MAX_DIMS for entry in entries.values()):
        raise InputError(f"{unreadable} a tensor has more than {MAX_DIMS} dimensions.")
    return entries, metadata


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
    sizes = {name: jnp.dtype(dtype).itemsize for name, (dtype, _) in shapes.items()}
    # Wide elements first, so that every tensor begins at a multiple of its element; the package orders alike.
    dtypes = {dtype: code for code, dtype in FLOATS.items()}
    names = sorted(shapes, key=lambda name: (-sizes[name], name))
    header: dict = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * sizes[name]
        header[name] = {"dtype": dtypes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = np.asarray(tensor(name), order="C")
            assert (jnp.dtype(shapes[name][0]), shapes[name][1]) == (value.dtype, value.shape), name
            file.write(value.reshape(-1).view(np.uint8).data)
