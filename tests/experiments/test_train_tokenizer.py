"""experiments/train_tokenizer.py: a byte-pair vocabulary from text."""

import lzma

import pytest

from tests.experiments import programs
from tree_ffn.data.tokenizers import load_tokenizer

TEXT = "the cat sat on the mat, the dog sat on the log. naïve café ☃\n" * 50


def trained(place, name="tokenizer.json", vocab=300):
    (place / "text.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    target = place / name
    done = programs.call(
        "train_tokenizer", f"--files={place}/text.txt.xz", f"--vocab={vocab}", f"--to={target}"
    )
    assert done.code == 0, done.err
    return target


def test_it_encodes_any_text_and_gives_it_back(tmp_path):
    tokenizer = load_tokenizer(str(trained(tmp_path)))
    assert 257 < tokenizer.vocab_size <= 300 and tokenizer.end_token == "<|endoftext|>"
    for text in (TEXT, "Unseen: żółć \N{SNOWMAN}\t\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2


def test_the_same_text_gives_the_same_file(tmp_path):
    one, other = (trained(tmp_path, name) for name in ("one.json", "other.json"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--files is missing"),
        (("--files={here}/*.txt", "--to={here}/t.json", "--vocab=256"), "--vocab: 256 is not allowed"),
        (("--files={here}/none*", "--to={here}/t.json"), "none"),
        (("--files={here}/a.txt", "--to={here}/a.txt"), "exists"),
        (("--files={here}/a.txt", "--to={here}/no/t.json"), "cannot be written"),
    ],
)
def test_bad_input(tmp_path, arguments, said):
    (tmp_path / "a.txt").write_text("some text")
    done = programs.call("train_tokenizer", *(word.format(here=tmp_path) for word in arguments))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert (tmp_path / "a.txt").read_text() == "some text" and not (tmp_path / "t.json").exists()
