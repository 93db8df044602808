"""What a file holds, by its name: every kind read alike by every door, the rest refused by name."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from tree_ffn.data.formats import decoded, kind_of, read_objects, read_text
from tree_ffn.data.qa_rows import prepare_questions
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import file_inputs
from tree_ffn.data.tokenizers import ByteTokenizer
from tree_ffn.data.whole_text import whole_text
from tree_ffn.errors import InputError

TEXTS = ["one\ntwo", "three né 東 🙂", "", "four"]
ROWS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
NAMES = {
    "a.ldjson": LINES,
    "a.jsonl": LINES, "a.ndjson": LINES, "a.jsonlines": LINES, "a.JSONL": LINES, "a.json": LINES,
    "c4-train.00000-of-00512.json.gz": gzip.compress(LINES), "a.Json.GZ": gzip.compress(ARRAY),
    "a.jsonl.bz2": bz2.compress(LINES), "b.json": ARRAY, "a.json.xz": lzma.compress(ARRAY), "c.jsonl": ARRAY,
}  # fmt: skip


def put(path, content):
    path.write_bytes(content)
    return path


def read(path, **fields):
    """The documents that training would be given."""
    (source,) = file_inputs(CorpusSpec(corpus="files", files=str(path), **fields)).sources
    return [segment.text for segment in source.read(lambda position: None)]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_json(tmp_path, name):
    path = put(tmp_path / name, NAMES[name])
    assert read(path) == [text for text in TEXTS if text]
    assert whole_text(str(path), ByteTokenizer()).bytes == sum(len(text.encode()) for text in TEXTS)
    questions = CorpusSpec(corpus="files", files=str(path), valid_files=str(path.parent / "held.jsonl"))
    put(tmp_path / "held.jsonl", b'{"n": "q", "text": "a"}')
    with pytest.raises(InputError, match="no texts under 'n' and 'text'"):  # numbers are no prompts
        prepare_questions(questions, 33, "n", "text")


def test_questions_may_be_an_array(tmp_path):
    rows = [{"prompt": f"{n}?", "answer": str(n)} for n in range(60)]
    array = put(tmp_path / "a.json", json.dumps(rows).encode())
    lines = put(tmp_path / "a.ndjson", "\n".join(map(json.dumps, rows)).encode())
    made = [
        prepare_questions(CorpusSpec(corpus="files", files=str(path)), 9, "prompt", "answer").meta["splits"]
        for path in (array, lines)
    ]
    assert made[0] == made[1] and made[0]["train"]["rows"] + made[0]["valid"]["rows"] == 60


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, size in (("a.parquet", 1000), ("b.PQ", 2)):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name, row_group_size=size)
        assert read(tmp_path / name) == [text for text in TEXTS if text]
    with pytest.raises(InputError, match=r"a\.parquet: has no column 'body'; its columns are text, n\."):
        read(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: no text under 'n'"):
        read(tmp_path / "a.parquet", text_field="n")
    for content in (b"", b"PAR1 and nothing else PAR1", (tmp_path / "a.parquet").read_bytes()[:-9]):
        with pytest.raises(InputError, match=r"c\.parquet: cannot be read as parquet \("):
            read(put(tmp_path / "c.parquet", content))
    with pytest.raises(InputError, match="parquet, which is packed in itself"):
        read(put(tmp_path / "a.parquet.gz", b""))


@pytest.mark.parametrize(
    "name", ["a.txt", "README.md", "a.py", "Makefile", "train.de", "a.jsonl.old", "a.pt"]
)
def test_other_names_are_plain_text(tmp_path, name):
    assert kind_of(Path(name)) == "text"
    path = put(tmp_path / name, b'{"text": "as it stands"}')
    assert read(path) == ['{"text": "as it stands"}'] == [read_text(path)]
    with pytest.raises(InputError, match="is plain text; use JSON lines"):
        list(read_objects(path, str(path)))


@pytest.mark.parametrize(
    "name, what",
    [
        ("a.csv", r"\.csv is a table; write its texts as JSON lines"), ("a.tsv.gz", r"\.tsv is a table"),
        ("a.arrow", r"\.arrow is a table"), ("a.PDF", r"\.pdf is a document"), ("a.docx", "is a document"),
        ("a.npy", "holds numbers"), ("a.bin", "holds numbers"), ("a.tfrecord", "holds numbers"),
        ("a.zip", "is an archive; unpack it"), ("a.tar.gz", r"\.tar is an archive"),
        ("a.tgz", "is an archive"),
        ("a.7z", "is an archive"), ("a.jsonl.lz4", r"\.lz4 is an archive"), ("a.txt.br", "is an archive"),
        ("a.txt.gz.gz", r"\.gz is packed twice"),
    ],
)  # fmt: skip
def test_the_rest_is_refused_by_name(tmp_path, name, what):
    path = put(tmp_path / name, b"anything")
    with pytest.raises(InputError, match=rf"^data\.files: {path}: .*{what}"):
        file_inputs(CorpusSpec(corpus="files", files=str(path)))
    with pytest.raises(InputError, match=what):
        read_text(path)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 1000])
def test_byte_order_marks_are_no_text(size):
    mark, end = "\ufeff", "<|endoftext|>"
    text = f"{mark}one\n{mark}{end}\n{mark}{mark}two \ufeff kept\n{mark}"
    content = text.encode()
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert "".join(decoded(chunks, Path("a"))) == f"one\n{end}\ntwo \ufeff kept\n"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = put(tmp_path / "a.txt", "\ufefftext".encode(encoding))
    with pytest.raises(InputError, match=rf"a\.txt: is {encoding[:6].upper()}; save it as UTF-8"):
        read(path)


def test_marks_in_json(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert read(put(tmp_path / "a.jsonl", mark + LINES + mark + LINES)) == [
        text for text in TEXTS * 2 if text
    ]
    assert read(put(tmp_path / "a.json", mark + ARRAY)) == [text for text in TEXTS if text]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": "x"}', "no text under 'body'"), ("3", "no text under"), ('"body"', "no text under"),
        ('{"body": 3}', "no text under"), ('{"body": null}', "no text under"),
        ("{", "is not JSON that can be read: expecting property name"),
        ('{"body": "x"', "is not JSON that can be read"), ('{"body": "x', "is not JSON that can be read"),
        ("[" * 100_000, "it is nested too deeply"), ('{"body": ' * 100_000, "it is nested too deeply"),
        ('{"body": "x", "n": ' + "7" * 5000 + "}", "a number of too many digits"),
        (r'{"body": "a \ud83d"}', r"'body' holds \\ud83d, half of a surrogate pair"),
        (r'{"body": "\udc00\ud800"}', r"'body' holds \\udc00, half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, said):
    path = put(tmp_path / "a.jsonl", b'{"body": "x"}\n\n' + line.encode())
    with pytest.raises(InputError, match=rf"a\.jsonl, line 3:? {said}|a\.jsonl, line 3 .*{said}"):
        read(path, text_field="body")


def test_other_fields_may_hold_what_the_text_may_not(tmp_path):
    line = r'{"text": "a", "score": NaN, "user": "\ud83d"}'
    assert read(put(tmp_path / "a.jsonl", line.encode())) == ["a"]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_bytes_that_are_not_utf8_are_named_by_offset(size):
    content = "né東🙂".encode()
    for bad, offset in (
        (content + b"\xff", len(content)),
        (content[:-1], len(content) - 4),
        (b"\x80" + content, 0),
    ):
        chunks = [bad[i : i + size] for i in range(0, len(bad), size)]
        with pytest.raises(InputError, match=f"^a.txt: byte {offset} is not UTF-8"):
            list(decoded(chunks, Path("a.txt")))
    assert (
        "".join(decoded([content[i : i + size] for i in range(0, len(content), size)], Path("a.txt")))
        == "né東🙂"
    )


@pytest.mark.parametrize(
    "content",
    ["no mark\n".encode("utf-16-le"), b"a.txt".ljust(257, b"\0") + b"ustar".ljust(255, b"\0") + b"text"],
)
def test_what_is_no_text_by_its_beginning_is_refused(tmp_path, content):
    for name, pack in (("a.txt", bytes), ("a.xz", lzma.compress), ("a.jsonl.gz", gzip.compress)):
        with pytest.raises(InputError, match=rf"{name}: is no text \(many bytes are 0"):
            read(put(tmp_path / name, pack(content)))
    assert read(put(tmp_path / "b.txt", b"a\0b")) == ["a\0b"]


def test_parquet_that_is_not_fetched_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    path = put(tmp_path / "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(InputError, match=r"a\.parquet is a pointer of git-lfs"):
        read(path)


def test_without_pyarrow_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InputError, match=r"a\.parquet: parquet needs the package pyarrow; `pip install .tree_ffn\[parquet\]"
    ):
        read(put(tmp_path / "a.parquet", b"PAR1"))
