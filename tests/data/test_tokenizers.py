"""Ids and text of every kind of tokenizer, and what is refused."""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.kinds_of_tokenizers import KINDS, file_tokenizer, tokenizer_json
from tree_ffn.data import documents, load_tokenizer
from tree_ffn.data.compressed import read_bytes
from tree_ffn.errors import InputError

TEXTS = ("Hello world", "a\n\nb  c\t", "naïve 東京 🙂", "", "x <|endoftext|> y")


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not os.environ.get("TREE_FFN_DATA"):
        pytest.skip("TREE_FFN_DATA names no directory with tokenizers/gpt2, opt and pythia")
    return Path(os.environ["TREE_FFN_DATA"]) / "tokenizers"


def small_bpe(
    directory: Path, vocabulary=("a", "b", "ab", "<|endoftext|>"), merges="#version: 0.2\na b\n"
) -> str:
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (directory / "merges.bpe").write_text(merges)
    return f"{directory}/vocab.json,{directory}/merges.bpe"


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_utf8_and_back(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.end_id, 300, -1]) == text
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)


def test_half_a_character_decodes_to_a_replacement():
    assert load_tokenizer("bytes").decode("é".encode()[:1]) == "\ufffd"


def test_pair_of_files_packed_or_not(tmp_path):
    plain = load_tokenizer(small_bpe(tmp_path))
    assert plain.encode("abba").tolist() == [2, 1, 0]
    assert (plain.vocab_size, plain.end_id, plain.name) == (4, 3, "vocab.json+merges.bpe")
    for name in ("vocab.json", "merges.bpe"):
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress((tmp_path / name).read_bytes()))
    packed = load_tokenizer(f"{tmp_path}/vocab.json.xz, {tmp_path}/merges.bpe.xz")
    assert packed.fingerprint == plain.fingerprint and packed.name == plain.name


def test_fingerprint_follows_the_content(tmp_path):
    first = load_tokenizer(small_bpe(tmp_path)).fingerprint
    assert load_tokenizer(small_bpe(tmp_path, ("b", "a", "ab", "<|endoftext|>"))).fingerprint != first


@pytest.mark.parametrize("kind", KINDS)
def test_marked_text_has_its_special_tokens(kind):
    """And what is between them is text as ever."""
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode_marked("the tree</s>the</s>").tolist()
    assert ids.count(tokenizer.end_id) == 2 and ids[-1] == tokenizer.end_id
    assert ids[: ids.index(tokenizer.end_id)] == tokenizer.encode("the tree").tolist()


def test_any_tokenizer_json_and_special_tokens_as_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({chr(c): c - 32 for c in range(32, 127)}, []))
    engine.add_special_tokens(["<|endoftext|>"])
    engine.enable_truncation(2)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.end_id == 95 and tokenizer.vocab_size == 96
    text = "a<|endoftext|>b"
    assert tokenizer.encode(text).tolist() == [ord(c) - 32 for c in text]


@pytest.mark.parametrize("name", ["byte", "gpt2", "", "a,b,c", "missing.json", "missing.json,missing.bpe"])
def test_unknown_names_list_what_is_allowed(name):
    with pytest.raises(
        InputError, match=r"^data\.tokenizer: .*use 'bytes', the path of a tokenizer\.json, or"
    ):
        load_tokenizer(name)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: small_bpe(d, merges="a c\n"),
        lambda d: small_bpe(d, merges="a\n"),
        lambda d: (small_bpe(d), (d / "vocab.json").write_text("{"))[0],
        lambda d: (small_bpe(d), (d / "merges.bpe").write_bytes(b"\xff"))[0],
        lambda d: small_bpe(d).split(",")[0],
        lambda d: small_bpe(d, ("a", "b", "ab")),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, break_it):
    with pytest.raises(InputError, match=r"^data\.tokenizer: ") as error:
        load_tokenizer(break_it(tmp_path))
    assert "\n" not in str(error.value)


def test_gpt2(real_data):
    tokenizer = load_tokenizer(f"{real_data}/gpt2/encoder.json.xz,{real_data}/gpt2/vocab.bpe.xz")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.end_id, tokenizer.vocab_size) == (50256, 50257)
    check_round_trip(tokenizer)


def test_opt(real_data):
    tokenizer = load_tokenizer(f"{real_data}/opt/gpt2-vocab.json.xz,{real_data}/gpt2/vocab.bpe.xz")
    assert tokenizer.encode("Hello world").tolist() == [31414, 232]
    assert tokenizer.encode(". the").tolist() == [4, 5]
    assert (tokenizer.end_id, tokenizer.vocab_size) == (2, 50265)
    check_round_trip(tokenizer)


def test_pythia(real_data):
    tokenizer = load_tokenizer(f"{real_data}/pythia/20B_tokenizer.json.xz")
    assert tokenizer.encode("Hello world").tolist() == [12092, 1533]
    assert (tokenizer.end_id, tokenizer.vocab_size) == (0, 50277)
    check_round_trip(tokenizer)


@pytest.mark.parametrize(
    "files",
    [
        "gpt2/encoder.json.xz,gpt2/vocab.bpe.xz",
        "opt/gpt2-vocab.json.xz,gpt2/vocab.bpe.xz",
        "pythia/20B_tokenizer.json.xz",
    ],
)
def test_cutting_a_document_does_not_change_its_tokens(real_data, monkeypatch, files):
    tokenizer = load_tokenizer(",".join(f"{real_data}/{name}" for name in files.split(",")))
    text = read_bytes(real_data.parent / "wikitext2/valid.raw.txt.xz").decode()[:200_000]
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 200)
    pieces = [segment.text for segment in documents.segments([(text, True)])]
    assert len(pieces) > 1000
    assert np.concatenate(tokenizer.encode_batch(pieces)).tolist() == tokenizer.encode(text).tolist()


def check_round_trip(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids
        assert tokenizer.decode([*ids, tokenizer.end_id, 10**6]) == text


def test_files_of_any_name_and_with_marks(tmp_path):
    plain = load_tokenizer(small_bpe(tmp_path))
    folder = tmp_path / "GPT-2, [small]"
    folder.mkdir()
    for name in ("vocab.json", "merges.bpe"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    marked = load_tokenizer(f"{folder}/vocab.json, {folder}/merges.bpe")
    assert marked.encode("abab").tolist() == plain.encode("abab").tolist()
    assert marked.fingerprint == plain.fingerprint
    (folder / "vocab.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match=r"^data\.tokenizer: the vocabulary .* is nested too deeply"):
        load_tokenizer(f"{folder}/vocab.json,{folder}/merges.bpe")


def word_level(tokenizers):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def unigram(tokenizers):
    return tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("</s>", -2.0)], None))


@pytest.mark.parametrize("make", [word_level, unigram])
def test_text_that_the_library_cannot_encode_is_one_sentence(make, tmp_path):
    make(pytest.importorskip("tokenizers")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a").tolist() == [0]
    for encode in (tokenizer.encode, tokenizer.encode_marked):
        with pytest.raises(InputError, match="'tokenizer.json' cannot encode the text"):
            encode("b")


def test_a_panic_of_the_library_is_one_sentence(tmp_path, capfd):
    pytest.importorskip("tokenizers")
    state = json.loads(tokenizer_json("byte level"))
    state["model"]["continuing_subword_prefix"] = "longer than any token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"cannot be used \(range .* out of range .*\); use 'bytes'"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    os.write(2, b"stderr as before")
    assert capfd.readouterr().err == "stderr as before"
