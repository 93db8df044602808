"""Headers that lie are refused before anything is allocated; files are what the package reads and writes."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tests.huggingface.make_pretrained_fixtures import FIXTURES
from tree_ffn.errors import InputError
from tree_ffn.huggingface import pretrained
from tree_ffn.models.safetensors_file import MAX_HEADER, read_header, write

N_MUTATIONS = 3_000
VALID = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def store(path, header, data_bytes=32, n=None):
    """A file with this header (bytes, or values for JSON), said to be of n bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    n = len(text) if n is None else n
    path.write_bytes(n.to_bytes(8, "little") + text + b"\0" * data_bytes)
    return str(path)


def changed(**fields):
    return {**VALID, "b": {**VALID["b"], **fields}}


def test_what_the_package_writes_is_read(tmp_path):
    tensors = {"b": np.ones((4,), np.float16), "a": np.ones((2, 3), np.float32), "none": np.ones((0, 2))}
    save_file(tensors, tmp_path / "a", metadata={"x": "y"})
    entries = read_header(str(tmp_path / "a"))
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "none": ("F64", (0, 2)), "a": ("F32", (2, 3)), "b": ("F16", (4,)),
    }  # fmt: skip
    assert list(entries) == list(safe_open(tmp_path / "a", framework="numpy").offset_keys())


def test_the_package_reads_what_is_written(tmp_path):
    import ml_dtypes

    tensors = {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.float16),
        "b": np.arange(4, dtype=ml_dtypes.bfloat16),
        "t": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.float32(7).reshape(()),
    }
    write(str(tmp_path / "a"), {k: (v.dtype.name, v.shape) for k, v in tensors.items()}, tensors.__getitem__)
    for name, value in load_file(tmp_path / "a").items():
        assert value.dtype == tensors[name].dtype
        np.testing.assert_array_equal(value, tensors[name])
    assert read_header(str(tmp_path / "a")).keys() == tensors.keys()


@pytest.mark.parametrize(
    "header, fields, words",
    [
        (b"", {}, "invalid JSON in header"),
        (b"[]", {}, "invalid JSON in header"),
        (b"{", {}, "invalid JSON in header"),
        (b'{"\xff": 1}', {}, "invalid UTF-8 in header"),
        (b'{"a":' * 100_000, {}, "recursion limit exceeded"),
        (b'{"a": 1, "a": 2}', {}, "invalid type: integer `1`"),
        (VALID, {"n": 2**63}, "it is a file of another kind, or its header has 9223372036854775808 bytes"),
        (VALID, {"data_bytes": 31}, "file not fully covered"),
        (VALID, {"data_bytes": 33}, "file not fully covered"),
        (b" " * (MAX_HEADER + 1), {}, f"its header has {MAX_HEADER + 1} bytes and at most {MAX_HEADER}"),
        ({**VALID, "__metadata__": {"format": 1}}, {}, "invalid type: integer `1`, expected a string"),
        ({**VALID, "b": []}, {}, "expected struct TensorInfo"),
        ({**VALID, "b": {"dtype": "BF16", "shape": [4]}}, {}, "missing field `data_offsets`"),
        (changed(dtype="F31"), {}, "unknown variant `F31`"),
        (changed(dtype="F" * 999), {}, "unknown variant `FFFF"),
        (changed(dtype=["F32"]), {}, "invalid type: sequence, expected string"),
        (changed(shape=[-4]), {}, "invalid value: integer `-4`"),
        (changed(shape=[4.0]), {}, "invalid type: floating point `4.0`"),
        (changed(shape=[True] * 4), {}, "invalid type: boolean `true`"),
        (changed(shape=[4] + [1] * 8), {}, "a tensor has more than 8 dimensions"),
        (changed(shape=[2**64]), {}, "invalid type: floating point"),
        (changed(data_offsets=[24]), {}, "expected a tuple of size 2"),
        (changed(shape=[2**62, 2**62]), {}, "overflow computing buffer size"),
        (changed(shape=[5]), {}, "invalid shape, data type, or offset"),
        (changed(data_offsets=[32, 24]), {}, "invalid offset for tensor `b`"),
        (changed(data_offsets=[20, 28]), {}, "invalid offset for tensor `b`"),
        (changed(data_offsets=[28, 36]), {}, "invalid offset for tensor `b`"),
        (changed(data_offsets=[0, 8]), {}, "invalid offset for tensor `a`"),
        ({**VALID, "c\n" * 99: 1}, {}, "expected struct TensorInfo"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path, header, fields, words):
    path = store(tmp_path / "a.safetensors", header, **fields)
    with pytest.raises(InputError, match=words) as error:
        read_header(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("size", [0, 7, 8, 100, 1000, 28_000])
def test_files_cut_off_anywhere(tmp_path, size):
    whole = (FIXTURES / "opt_relu" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    (tmp_path / "config.json").write_bytes((FIXTURES / "opt_relu" / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot be read as safetensors: "):
        pretrained.load(str(tmp_path))


def mutated(random: random.Random, whole: bytes) -> bytes:
    """A file with damage where its header is: bytes, digits, whole numbers, pieces, lengths, ends."""
    n = int.from_bytes(whole[:8], "little")
    content = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 5))):
        kind, at = random.randrange(7), random.randrange(8, 8 + n)
        if kind in (0, 1) and at >= len(content):  # that much is gone already
            continue
        if kind == 0:
            content[at] = random.randrange(256)
        elif kind == 1:
            digits = [i for i in range(8, min(8 + n, len(content))) if chr(content[i]).isdigit()]
            content[random.choice(digits or [at])] = ord(random.choice("0123456789-.e"))
        elif kind == 2:
            number = random.choice((0, 1, n - 1, n + 1, 2**31, 2**63 - 1, 2**64 - 1, random.randrange(2**64)))
            content[:8] = number.to_bytes(8, "little")
        elif kind == 3:
            del content[at : at + random.randrange(1, 40)]
        elif kind == 4:
            piece = random.choice((b"9" * 30, b"[", b"}", b'"', b"-1", b"1e999", b"null", b"NaN", b"\\ud800"))
            content[at:at] = piece
        elif kind == 5:
            del content[random.randrange(len(content)) :]
        else:
            other = random.randrange(8, 8 + n)
            content[at : at + 20] = content[other : other + 20]
        content = content or bytearray(b"\0")
    return bytes(content)


@pytest.mark.slow
def test_thousands_of_damaged_headers(tmp_path):
    """Each is refused in one sentence, or it describes its file still: then the package reads it too.

    Memory stays at a small multiple of the file's 28 kB, whatever the header asks for.
    """
    whole = (FIXTURES / "opt_relu" / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((FIXTURES / "opt_relu" / "config.json").read_bytes())
    path = tmp_path / "model.safetensors"
    chance, refused, loaded = random.Random(0), 0, 0
    path.write_bytes(whole)
    pretrained.load(str(tmp_path))  # what jax keeps of a first time is not counted
    tracemalloc.start()
    try:
        for _ in range(N_MUTATIONS):
            path.write_bytes(mutated(chance, whole))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read_header(str(path))
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 500
                refused += 1
            else:
                with safe_open(path, framework="numpy") as file:
                    assert file.keys() is not None
                try:
                    pretrained.load(str(tmp_path))
                    loaded += 1
                except InputError as error:
                    assert "\n" not in str(error)
            assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    finally:
        tracemalloc.stop()
    assert refused > 0.8 * N_MUTATIONS and loaded < 0.1 * N_MUTATIONS


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    from tree_ffn.huggingface.checkpoint_files import open_files

    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((FIXTURES / "opt_relu" / name).read_bytes())
    files = open_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        files.read("model.decoder.embed_tokens.weight")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "model.safetensors", framework="numpy")
