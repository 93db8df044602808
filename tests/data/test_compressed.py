"""Packed files: whole, however many streams they have, or refused."""

import bz2
import gzip
import lzma
import os
import random
import struct
from pathlib import Path

import pytest

from tree_ffn.data import compressed
from tree_ffn.data.compressed import plain_name, read_bytes
from tree_ffn.errors import InputError

zstandard = pytest.importorskip("zstandard")
CONTENT = random.Random(0).randbytes(3000) * 3
HALVES = CONTENT[:4000], CONTENT[4000:]


def pack_lzma(content):
    return lzma.compress(content, lzma.FORMAT_ALONE)


def pack_zst(content, window_log=20):
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()  # the size is not written
    return packer.compress(content) + packer.flush()


def skippable(n):
    return struct.pack("<II", 0x184D2A50, n) + bytes(n)


PACKERS = {
    ".gz": gzip.compress, ".gzip": gzip.compress, ".GZ": gzip.compress, ".xz": lzma.compress,
    ".Xz": lzma.compress, ".zst": pack_zst, ".zstd": pack_zst, ".bz2": bz2.compress, ".lzma": pack_lzma,
}  # fmt: skip


def read(tmp_path, suffix, stored):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(stored)
    assert plain_name(path) == "a.txt"
    return read_bytes(path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_one_stream(tmp_path, suffix):
    assert read(tmp_path, suffix, PACKERS[suffix](CONTENT)) == CONTENT
    assert read(tmp_path, suffix, PACKERS[suffix](b"")) == b""


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2"])
def test_many_streams(tmp_path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(compressed, "_CHUNK", chunk)
    monkeypatch.setattr(compressed, "_ZST_CHUNK", chunk)
    first, second = map(PACKERS[suffix], HALVES)
    nothing = PACKERS[suffix](b"")
    assert read(tmp_path, suffix, first + second) == CONTENT
    assert read(tmp_path, suffix, nothing + first + nothing + second + nothing) == CONTENT


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("between, behind", [(4, 0), (0, 4), (8, 512), (2048, 12)])
def test_padding_of_xz(tmp_path, between, behind, chunk, monkeypatch):
    monkeypatch.setattr(compressed, "_CHUNK", chunk)
    first, second = map(lzma.compress, HALVES)
    assert read(tmp_path, ".xz", first + bytes(between) + second + bytes(behind)) == CONTENT


def test_what_may_stand_between_frames_and_members(tmp_path):
    first, second = map(pack_zst, HALVES)
    frames = skippable(0) + first + skippable(5000) + second + skippable(3)
    assert read(tmp_path, ".zst", frames) == CONTENT
    first, second = map(gzip.compress, HALVES)
    assert read(tmp_path, ".gz", first + bytes(7) + second + bytes(100)) == CONTENT


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2", ".lzma"])
def test_what_is_not_whole_is_refused(tmp_path, suffix):
    stream = PACKERS[suffix](CONTENT)
    middle = len(stream) // 2
    bad = [b"", stream[:-3], stream[:middle], stream + b"rubbish behind a stream", stream + b"r"]
    bad += [stream + stream[:cut] for cut in (2, middle, len(stream) - 3)]
    if suffix != ".zst":  # its frames have a checksum only if that is asked for
        damaged = bytes(byte ^ 255 for byte in stream[middle : middle + 8])
        bad += [stream + stream[:middle] + damaged + stream[middle + 8 :]]
    if suffix == ".xz":
        bad += [stream + bytes(n) + tail for n in (1, 2, 3, 6) for tail in (b"", stream)]
        bad += [bytes(4) + stream, stream + bytes(4) + b"rubbish"]
    for stored in bad:
        with pytest.raises(InputError, match=r"a\.txt\.\w+: cannot be unpacked \(.+\); use an intact file"):
            read(tmp_path, suffix, stored)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_large_windows_are_read(tmp_path, window_log):
    assert read(tmp_path, ".zst", pack_zst(CONTENT, window_log)) == CONTENT


def test_what_needs_too_much_memory_is_named(tmp_path):
    window_of_4_gib = struct.pack("<I", 0xFD2FB528) + bytes([0, 22 << 3, 1, 0, 0])
    dictionary_of_4_gib = b"\x5d" + struct.pack("<I", 0xF0000000) + b"\xff" * 8 + bytes(20)
    for suffix, stored in ((".zst", window_of_4_gib), (".lzma", dictionary_of_4_gib)):
        with pytest.raises(InputError, match=r"a\.txt.*needs more memory .* 2 GiB that are allowed"):
            read(tmp_path, suffix, stored)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_what_git_lfs_left_is_named(tmp_path, suffix):
    with pytest.raises(InputError, match=r"a\.txt.* is a pointer of git-lfs, not the file; fetch it"):
        read(tmp_path, suffix, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def test_a_pipe_is_read():
    """Prompts may come from one, as --prompts=/dev/stdin."""
    reads, writes = os.pipe()
    with open(writes, "wb") as file:
        file.write(b"one\ntwo\n")
    assert read_bytes(Path(f"/dev/fd/{reads}")) == b"one\ntwo\n"
    os.close(reads)
