"""Finding and hashing what a corpus is made from."""

import gzip
import hashlib
import lzma
import subprocess

import pytest

from tree_ffn.data.compressed import read_bytes
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import file_inputs, find_inputs, stdlib_inputs, trained_on
from tree_ffn.errors import InputError


def pack_zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


PACKERS = {"": lambda content: content, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": pack_zst}


def read(inputs) -> list[str]:
    """The documents of all sources."""
    found = [""]
    for source in inputs.sources:
        for segment in source.read(lambda position: None):
            found[-1] += segment.text
            if segment.ends:
                found.append("")
    return found[:-1]


def files(tmp_path, patterns="*", **fields) -> CorpusSpec:
    pattern = ",".join(f"{tmp_path}/{part}" for part in patterns.split(","))
    return CorpusSpec(corpus="files", files=pattern, **fields)


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_read_as_plain_ones(tmp_path, suffix):
    content = b"some text\n" * 300_000
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](content))
    assert read_bytes(path) == content
    assert read(file_inputs(files(tmp_path))) == [content.decode()]
    if suffix:
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"a\.txt.*: cannot be unpacked \("):
            read_bytes(path)
        path.write_bytes(b"this was never packed")
        with pytest.raises(InputError, match=r"a\.txt.*: cannot be unpacked \("):
            read_bytes(path)


def test_positions_reach_the_stored_size(tmp_path):
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"some text\n" * 300_000))
    (source,) = file_inputs(files(tmp_path)).sources
    positions = []
    list(source.read(positions.append))
    assert positions == sorted(positions) and positions[-1] == source.stored_bytes


def test_hash_is_what_sha256sum_says(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    command = f"cd {tmp_path} && sha256sum a.txt b.txt | sha256sum"
    expected = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert file_inputs(files(tmp_path)).sha256 == expected
    one = file_inputs(files(tmp_path, "a.txt"))
    assert one.sha256 == hashlib.sha256(b"text of a.txt").hexdigest()


def test_globs_and_splits(tmp_path):
    for name in ("x/a.txt", "x/b.txt", "y/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("jsonl") else name)
    inputs = file_inputs(files(tmp_path, "x/*.txt,../" + tmp_path.name + "/**/*.*"))
    assert [name for name, _, _ in inputs.listing] == ["a.txt", "b.txt", "c.jsonl"]
    assert inputs.name == "deep+x" and read(inputs) == ["x/a.txt", "x/b.txt", "json"]
    inputs = file_inputs(files(tmp_path, "x/*", valid_files=f"{tmp_path}/x/b*"))
    assert [(name, split) for name, _, split in inputs.listing] == [("a.txt", "train"), ("b.txt", "valid")]


@pytest.mark.parametrize(
    "name", ["link.txt", "hard.txt", "copy.txt", "../named/a.txt", "./x/../a.txt", "up/a.txt"]
)
def test_a_held_out_file_is_not_trained_on_by_another_name(tmp_path, name):
    folder = tmp_path / "named"
    (folder / "x").mkdir(parents=True)
    for letter in "abc":
        (folder / f"{letter}.txt").write_text(f"text of {letter}")
    (folder / "up").symlink_to(".")
    (folder / "link.txt").symlink_to("a.txt")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    (folder / "copy.txt").write_text("text of a")
    inputs = file_inputs(files(folder, "**/*.txt", valid_files=f"{folder}/{name}"))
    assert sorted((sha256, split) for _, sha256, split in inputs.listing) == sorted(
        (hashlib.sha256(f"text of {letter}".encode()).hexdigest(), "valid" if letter == "a" else "train")
        for letter in "abc"
    )
    (said,) = inputs.notes  # on the copy, or where that is held out, on the file
    assert f"is not trained on: it holds the same as {folder}" in said
    with pytest.raises(InputError, match=r"matches nothing that data\.valid_files leaves"):
        file_inputs(files(folder, "a.txt,link.txt,copy.txt,hard.txt", valid_files=f"{folder}/{name}"))


def test_a_held_out_text_is_not_trained_on_packed_otherwise(tmp_path):
    """Also where it begins as others do, and where both are packed, which writes the time into .gz."""
    begin = "a head of all, " * 9_000
    for name, text in {"a": begin + "one", "b": begin + "two", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
        (tmp_path / f"{name}.1.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=1))
    (tmp_path / "held").mkdir()
    (tmp_path / "held/x.txt.gz").write_bytes(gzip.compress((begin + "two").encode(), mtime=2))
    spec = files(tmp_path, "*.txt*", valid_files=f"{tmp_path}/held/*")
    names = sorted(name for name, _, split in file_inputs(spec).listing if split == "train")
    assert names == ["a.1.txt.gz", "a.txt", "a.txt.xz", "c.1.txt.gz", "c.txt", "c.txt.xz"]
    assert trained_on(spec, f"{tmp_path}/a.txt.xz,{tmp_path}/b.txt.xz") == [tmp_path / "a.txt.xz"]


def test_links_to_a_file_are_one_and_copies_are_said(tmp_path):
    for name, text in {"a": "one", "b": "two", "c": "one", "d": "", "e": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "f.txt").symlink_to("b.txt")
    for loop in ("loop", "again", "z"):  # of more than one, each name would be followed from each
        (tmp_path / loop).symlink_to(".")
    inputs = file_inputs(files(tmp_path, "**/*.txt,b.txt"))
    assert [name for name, _, _ in inputs.listing] == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt"]
    assert inputs.notes == (f"{tmp_path}/c.txt is read as well as {tmp_path}/a.txt, which holds the same",)


def test_texts_that_a_run_was_trained_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked/link").symlink_to("../a.txt")
    (tmp_path / "asked/copy").write_text("text b")
    (tmp_path / "asked/held").write_text("text c")
    (tmp_path / "asked/new").write_text("text d")
    spec = files(tmp_path, "*.txt", valid_files=f"{tmp_path}/c.txt")
    found = trained_on(spec, f"{tmp_path}/asked/*")
    assert [path.name for path in found] == ["copy", "link"]
    assert trained_on(CorpusSpec(), f"{tmp_path}/asked/*") == []
    (tmp_path / "a.txt").unlink()
    assert trained_on(files(tmp_path, "a.txt"), f"{tmp_path}/asked/*") == []


def test_many_directories_make_a_short_name(tmp_path):
    for i in range(5):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}/a.txt").write_text("text")
    assert file_inputs(files(tmp_path, "d[01]/*")).name == "d0+d1"
    assert file_inputs(files(tmp_path, "*/*")).name == "d0+4_more"


def test_globs_that_match_nothing(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"^data\.files: .*none\*' matches no file"):
        find_inputs(files(tmp_path, "a.txt,none*"))
    with pytest.raises(InputError, match=r"^data\.files: .*matches no file"):
        find_inputs(files(tmp_path, "directory"))
    with pytest.raises(InputError, match=r"^data\.valid_files: 'x' matches no file"):
        find_inputs(files(tmp_path, valid_files="x"))
    with pytest.raises(InputError, match=r"^data\.files: .* matches nothing that data\.valid_files leaves"):
        find_inputs(files(tmp_path, valid_files=f"{tmp_path}/*.txt"))


def test_standard_library_rules(tmp_path):
    for name in (
        "z.py",
        "a/b.py",
        "a/test/c.py",
        "tests/d.py",
        "site-packages/e.py",
        "idlelib/f.py",
        "g.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").write_text("")
    inputs = stdlib_inputs(tmp_path)
    assert [name for name, _, _ in inputs.listing] == ["a/b.py", "empty.py", "z.py"]
    assert read(inputs) == ["# a/b.py", "# z.py"]
    assert inputs.facts["files_left_out"] == 1


def test_the_real_standard_library_is_there():
    inputs = stdlib_inputs()
    names = {name for name, _, _ in inputs.listing}
    assert {"json/decoder.py", "textwrap.py"} <= names and not any("/test/" in name for name in names)
    assert len(names) > 300 and inputs.sources[0].stored_bytes > 5e6
