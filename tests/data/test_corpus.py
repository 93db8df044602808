"""Preparing a corpus: rows against the plain definition, the cache, and what goes wrong."""

import collections
import hashlib
import json
import lzma
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tree_ffn.data import CorpusSpec, cache, corpus_spec_from_config, documents, packing, prepare, tokenise
from tree_ffn.data.spec import with_corpus
from tree_ffn.errors import InputError

END = "<|endoftext|>"
SILENT = lambda line: None


def write_texts(directory: Path, n: int = 60) -> list[str]:
    """`n` documents of different length in two files; returns their texts."""
    texts = [f"Document {i}: {'é' * (i % 7)} " + f"word{i} " * (3 + i * 37 % 50) + "\n" for i in range(n)]
    (directory / "texts").mkdir()
    half = n // 2
    (directory / "texts/a.txt").write_text(f"{END}\n".join(texts[:half]))
    (directory / "texts/b.txt.xz").write_bytes(lzma.compress(f"{END}\n".join(texts[half:]).encode()))
    return texts


def spec_of(directory: Path, **fields) -> CorpusSpec:
    return CorpusSpec(
        **{
            "corpus": "files",
            "files": f"{directory}/texts/*",
            "cache_dir": f"{directory}/cache",
            "valid_share": 0.2,
            **fields,
        }
    )


def all_rows(source) -> np.ndarray:
    return source.rows(np.arange(len(source)))


def rows_by_definition(texts: list[str], row_tokens: int) -> np.ndarray:
    stream = [token for text in texts for token in [*text.encode(), 256]]
    width = row_tokens - 1
    return np.array([stream[i : i + row_tokens] for i in range(0, len(stream) - width, width)])


def split_by_definition(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    held_out = [documents.key_of(hashlib.sha256(text.encode()).digest()) < share * 2**64 for text in texts]
    return [t for t, h in zip(texts, held_out) if not h], [t for t, h in zip(texts, held_out) if h]


@pytest.mark.parametrize("small_pieces", [False, True])
def test_rows_are_the_stream_cut_with_one_token_shared(tmp_path, monkeypatch, small_pieces):
    if small_pieces:  # documents span segments, and parts
        monkeypatch.setattr(documents, "SEGMENT_CHARS", 40)
        monkeypatch.setattr(tokenise, "PART_CHARS", 100)
    texts = write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    train, valid = split_by_definition(texts, 0.2)
    assert 3 < len(valid) < 25
    for source, split, expected in ((corpus.train, "train", train), (corpus.valid, "valid", valid)):
        assert (all_rows(source) == rows_by_definition(expected, 33)).all()
        n_bytes = sum(len(text.encode()) for text in expected)
        figures = {"rows": len(source), "tokens": n_bytes + len(expected), "bytes": n_bytes}
        assert corpus.meta["splits"][split] == figures
    assert corpus.meta["documents"] == len(texts)


def test_every_token_but_the_first_is_a_target_once(tmp_path):
    texts = write_texts(tmp_path)
    found = all_rows(prepare(spec_of(tmp_path), 17, SILENT).train)
    stream = [token for text in split_by_definition(texts, 0.2)[0] for token in [*text.encode(), 256]]
    targets = found[:, 1:].reshape(-1)
    assert targets.tolist() == stream[1 : 1 + len(targets)] and len(stream) - 1 - len(targets) < 16
    assert (found[1:, 0] == found[:-1, -1]).all()


def test_named_valid_files_are_the_validation_split(tmp_path):
    texts = write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path, valid_files=f"{tmp_path}/texts/b*"), 33, SILENT)
    assert (all_rows(corpus.train) == rows_by_definition(texts[:30], 33)).all()
    assert (all_rows(corpus.valid) == rows_by_definition(texts[30:], 33)).all()


def test_one_long_text_is_divided_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 50)
    (tmp_path / "texts").mkdir()
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "texts/book.txt").write_text(text)
    corpus = prepare(spec_of(tmp_path, valid_share=0.1), 17, SILENT)
    sizes = {split: corpus.meta["splits"][split]["bytes"] for split in ("train", "valid")}
    assert sum(sizes.values()) == len(text) and 0 <= sizes["valid"] - len(text) / 10 < 50
    decode = lambda source: corpus.tokenizer.decode(all_rows(source)[:, :-1].reshape(-1))
    assert text.startswith(decode(corpus.train)) and text[sizes["train"] :].startswith(decode(corpus.valid))


def test_a_very_long_document_is_not_most_of_the_validation_text():
    sizes, keys = np.array([900, 10, 10, 80]), np.array([1, 2, 2**63, 2**63], np.uint64)
    part = tokenise.Part(Path(), "", sizes + 1, sizes, np.ones(4, bool), keys, True)
    splits = packing.choose_splits([part], row_tokens=5, valid_share=0.1)
    assert [mask.tolist() for _, mask in splits["valid"].chosen] == [[False, True, False, False]]


def test_wide_vocabularies_take_four_bytes():
    assert tokenise.token_dtype(65536) == np.uint16 and tokenise.token_dtype(65537) == np.uint32


def test_found_again_without_a_word(tmp_path):
    write_texts(tmp_path)
    lines = []
    first = prepare(spec_of(tmp_path), 33, lines.append)
    assert len(lines) == 2
    again = prepare(spec_of(tmp_path), 33, lines.append)
    assert len(lines) == 2 and again.meta == first.meta
    assert (all_rows(again.train) == all_rows(first.train)).all()


@pytest.mark.parametrize("change", ["text", "row", "share", "tokenizer", "field"])
def test_the_cache_key_follows_every_input(tmp_path, change, monkeypatch):
    write_texts(tmp_path)
    fields, row_tokens = {}, 33
    first = prepare(spec_of(tmp_path), row_tokens, SILENT)
    if change == "text":
        (tmp_path / "texts/a.txt").write_text(f"changed\n{END}\n" * 300)
    elif change == "tokenizer":
        monkeypatch.setattr(type(first.tokenizer), "fingerprint", "0" * 64)
    row_tokens = {"row": 17}.get(change, 33)
    fields = {
        "share": {"valid_share": 0.3},
        "field": {"text_field": "x"},
    }
    second = prepare(spec_of(tmp_path, **fields.get(change, {})), row_tokens, SILENT)
    assert second.directory != first.directory
    assert (second.meta["sha256"] == first.meta["sha256"]) == (change != "text")


def test_moved_text_is_found_again(tmp_path):
    write_texts(tmp_path)
    first = prepare(spec_of(tmp_path), 33, SILENT)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts").rename(tmp_path / "elsewhere/texts")
    second = prepare(spec_of(tmp_path, files=f"{tmp_path}/elsewhere/texts/*"), 33, SILENT)
    assert second.directory == first.directory


def test_meta_names_the_corpus_by_content_and_never_by_path(tmp_path):
    write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    assert corpus.meta["corpus"] == "texts" and len(corpus.meta["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(corpus.meta) and "/" not in json.dumps(corpus.meta)
    assert (corpus.directory / "SHA256SUMS").read_text().count("\n") == 2


def test_bytes_per_token_turns_nats_into_bits_per_byte(tmp_path):
    texts = write_texts(tmp_path)
    meta = prepare(spec_of(tmp_path), 33, SILENT).meta
    valid = split_by_definition(texts, 0.2)[1]
    n_bytes = sum(len(text.encode()) for text in valid)
    assert meta["bytes_per_token"] == n_bytes / (n_bytes + len(valid))


def test_standard_library_is_the_default(tmp_path):
    corpus = prepare(CorpusSpec(cache_dir=str(tmp_path)), 257, SILENT)
    assert corpus.meta["corpus"] == "python_stdlib"
    assert corpus.meta["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 0.02 < corpus.meta["splits"]["valid"]["bytes"] / corpus.meta["splits"]["train"]["bytes"] < 0.1
    assert len(corpus.train) > 15_000


def test_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """A process is killed while it tokenises; the next one keeps its parts and ends with equal rows."""
    write_texts(tmp_path)
    monkeypatch.setattr(tokenise, "PART_CHARS", 1000)
    program = f"""
        import os, signal
        from tree_ffn.data import CorpusSpec, prepare, tokenise
        tokenise.PART_CHARS = 1000
        write, count = tokenise._write, 0
        def killed(*args):
            global count
            count += 1
            if count == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)
        tokenise._write = killed
        prepare({spec_of(tmp_path)!r}, 33)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    kept = sorted((tmp_path / "cache").glob("*.partial/parts/*.npz"))
    assert len(kept) == 3
    kept[2].write_bytes(b"")  # what a power cut may leave of a renamed file
    written = []
    write = tokenise._write
    monkeypatch.setattr(
        tokenise, "_write", lambda path, *rest: (written.append(path.name), write(path, *rest))[1]
    )
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    assert written and not {kept[0].name, kept[1].name} & set(written)
    straight = prepare(spec_of(tmp_path, cache_dir=f"{tmp_path}/other"), 33, SILENT)
    assert corpus.meta == straight.meta and (all_rows(corpus.train) == all_rows(straight.train)).all()
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_two_at_once(tmp_path):
    write_texts(tmp_path)
    work = f"prepare({spec_of(tmp_path)!r}, 33, lambda line: None).meta['splits']"
    program = f"from tree_ffn.data import *; print({work})"
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and outputs[0] == outputs[1]


def test_works_without_the_optional_packages(tmp_path):
    write_texts(tmp_path)
    program = f"""
        import sys
        for name in ("tensorflow_datasets", "grain", "array_record", "ml_collections", "zstandard", "tqdm"):
            sys.modules[name] = None
        import importlib.util
        find = importlib.util.find_spec
        absent = lambda name: sys.modules.get(name, 0) is None
        importlib.util.find_spec = lambda name, *rest: None if absent(name) else find(name, *rest)
        from tree_ffn.data import *
        corpus = prepare({spec_of(tmp_path)!r}, 33)
        assert (next(Batches(corpus.train, 4, 0).iterate(2)) == Batches(corpus.train, 4, 0).at(2)).all()
        try:
            prepare(CorpusSpec(corpus="tfds", tfds_dir="x"), 33)
        except ValueError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("needs the packages tensorflow-datasets and array-record") == 1


def test_empty_and_short_corpora(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("")
    with pytest.raises(InputError, match="^data: the corpus is empty"):
        prepare(spec_of(tmp_path), 33, SILENT)
    (tmp_path / "texts/a.txt").write_text(f"one\n{END}\ntwo\n")
    with pytest.raises(InputError, match=r"^data: the train split has 0 tokens and a row needs 33;"):
        prepare(spec_of(tmp_path), 33, SILENT)


def test_a_text_that_is_not_utf8_stops_with_its_name(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "texts/c.txt").write_bytes(b"latin \xe9 text")
    with pytest.raises(InputError, match=r"c\.txt: byte 6 is not UTF-8"):
        prepare(spec_of(tmp_path), 33, SILENT)


def test_a_cache_directory_that_cannot_be_written(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        InputError, match=rf"^data\.cache_dir: {tmp_path}/file/x cannot be written \(Not a directory\)"
    ):
        prepare(spec_of(tmp_path, cache_dir=f"{tmp_path}/file/x"), 33, SILENT)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk(tmp_path, monkeypatch):
    write_texts(tmp_path)
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(InputError, match=rf"^data\.cache_dir: {tmp_path}/cache has 0 MB free"):
        prepare(spec_of(tmp_path), 33, SILENT)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenise.os, "replace", full)
    with pytest.raises(
        InputError, match=rf"^data\.cache_dir: {tmp_path}/other cannot be written \(No space left"
    ):
        prepare(spec_of(tmp_path, cache_dir=f"{tmp_path}/other"), 33, SILENT)
    monkeypatch.undo()
    assert len(prepare(spec_of(tmp_path), 33, SILENT).train)  # what was there still serves


def test_damaged_rows_are_named(tmp_path):
    write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    (path,) = [p for p in corpus.directory.rglob("*") if p.name.startswith("train.npy")]
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"foreign" * 20_000):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=str(corpus.directory)) as error:
            prepare(spec_of(tmp_path), 33, SILENT)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_rows_of_another_type_or_vocabulary_are_named(tmp_path, split):
    write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    path = corpus.directory / f"{split}.npy"
    whole = np.load(path)
    beyond = whole.copy()
    beyond[-1, -1] = 257
    for damage, said in (
        (whole.astype(np.float32), "holds float32, not uint16"),
        (whole.astype(np.int64), "holds int64, not uint16"),
        (beyond, "holds token id 257 and the vocabulary has 0 to 256"),
    ):
        np.save(path, damage)
        with pytest.raises(InputError, match=rf"{split}\.npy: {said}; delete its directory"):
            prepare(spec_of(tmp_path), 33, SILENT)
    np.save(path, whole)
    assert (all_rows(getattr(prepare(spec_of(tmp_path), 33, SILENT), split)) == whole).all()


def test_a_damaged_description(tmp_path):
    write_texts(tmp_path)
    corpus = prepare(spec_of(tmp_path), 33, SILENT)
    for text in ("{", "[" * 100_000):
        (corpus.directory / "meta.json").write_text(text)
        with pytest.raises(InputError, match=r"meta\.json: cannot be read .* delete its directory"):
            prepare(spec_of(tmp_path), 33, SILENT)
    whole = corpus.meta
    for damage, said in (
        ({}, "has no corpus"),
        ([], "holds no JSON object"),
        ({**whole, "splits": {"train": whole["splits"]["train"]}}, "has no splits/valid/rows"),
        ({**whole, "splits": 3}, "has no splits/train/rows"),
        ({**whole, "bytes_per_token": "one"}, "has bytes_per_token 'one', which is no number"),
        ({**whole, "dtype": "float32"}, "has dtype 'float32', not 'uint16'"),
        ({**whole, "row_tokens": 17}, "has row_tokens 17, not 33"),
    ):
        (corpus.directory / "meta.json").write_text(json.dumps(damage))
        with pytest.raises(InputError, match=rf"meta\.json: {said}; delete its directory"):
            prepare(spec_of(tmp_path), 33, SILENT)
    (corpus.directory / "meta.json").unlink()
    assert prepare(spec_of(tmp_path), 33, SILENT).meta == corpus.meta


@pytest.mark.parametrize(
    "field, value",
    [
        ("corpus", "wikipedia"),
        ("valid_share", 0.0),
        ("valid_share", 1.0),
        ("workers", -1),
        ("cache_dir", ""),
        ("files", ""),
        ("tokenizer", "words"),
    ],
)
def test_bad_fields_are_named(tmp_path, field, value):
    with pytest.raises(InputError, match=rf"^data\.{field}: "):
        prepare(spec_of(tmp_path, **{field: value}), 33, SILENT)


def test_tfds_needs_a_name():
    with pytest.raises(InputError, match=r"^data\.tfds_dir: "):
        CorpusSpec(corpus="tfds")


@pytest.mark.parametrize(
    "fields, corpus",
    [
        ({}, "python_stdlib"),
        ({"files": "a", "valid_files": "b"}, "files"),
        ({"tfds_dir": "a"}, "tfds"),
        ({"tfds_name": "a"}, "tfds"),
    ],
)
def test_the_corpus_is_the_one_whose_fields_are_named(fields, corpus):
    assert CorpusSpec(**fields) == CorpusSpec(corpus=corpus, **fields)
    config = pytest.importorskip("configs.common").base_config()
    config.data.update(fields)
    assert with_corpus(config.to_dict())["data"]["corpus"] == corpus
    config.data.corpus = "named"
    assert with_corpus(config.to_dict())["data"]["corpus"] == (corpus if fields else "files")
    config.data.corpus = "auto"
    assert corpus_spec_from_config(config) == CorpusSpec(**fields)


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"corpus": "python_stdlib", "files": "a"},
            "files: 'a' needs data.corpus='files'; data.corpus is 'py",
        ),
        ({"valid_files": "a"}, "valid_files: 'a' needs data.corpus='files'"),
        ({"tfds_dir": "a", "valid_files": "b"}, "valid_files: 'b' needs data.corpus='files'"),
        ({"files": "a", "tfds_dir": "b"}, "tfds_dir: 'b' needs data.corpus='tfds'; data.corpus is 'files'"),
        ({"files": "a", "tfds_name": "b"}, "tfds_name: 'b' needs data.corpus='tfds'"),
        ({"corpus": "python_stdlib", "tfds_name": "b"}, "tfds_name: 'b' needs data.corpus='tfds'"),
    ],
)
def test_fields_of_another_corpus_are_refused(fields, said):
    with pytest.raises(InputError, match=rf"^data\.{said}"):
        CorpusSpec(**fields)


def test_context_must_leave_a_target():
    with pytest.raises(InputError, match=r"^model\.max_seq_len: 0 "):
        prepare(CorpusSpec(), 1, SILENT)


def test_the_config_door_takes_every_field():
    common = pytest.importorskip("configs.common")
    config = common.base_config()
    spec = corpus_spec_from_config(config)
    assert spec.corpus == "python_stdlib" and spec.tokenizer == "bytes"
    config.data.corpus = "wikipedia"
    with pytest.raises(
        InputError, match=r"^data\.corpus: 'wikipedia' is not known; use one of: python_stdlib"
    ):
        corpus_spec_from_config(config)


def test_rows_and_key_of_a_fixed_corpus(tmp_path):
    """If rows change, count corpus.ROWS_VERSION up, so that no run goes on with rows of two kinds."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("".join(f"number {i}\n{END}\n" for i in range(40)))
    corpus = prepare(spec_of(tmp_path), 9, SILENT)
    content = b"".join(all_rows(source).astype("<i4").tobytes() for source in (corpus.train, corpus.valid))
    found = (corpus.directory.name, hashlib.sha256(content).hexdigest()[:16])
    assert found == ("texts-914461057e906d2a", "bdb69727a52d131d")
