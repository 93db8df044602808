"""Characters without a token: counted, refused where they are many, and no bytes where they are few."""

import json

import numpy as np
import pytest
import tokenizers

from experiments.common.loaded import Loaded
from tests.data.kinds_of_tokenizers import END, KINDS, file_tokenizer, tokenizer_json
from tree_ffn.data import CorpusSpec, load_tokenizer, prepare
from tree_ffn.data.cache import ArrayRows
from tree_ffn.data.corpus import _scanned
from tree_ffn.data.lost import Lost
from tree_ffn.data.tokenizers import FileTokenizer
from tree_ffn.data.whole_text import whole_text
from tree_ffn.errors import InputError
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.spec import ModelSpec

KNOWN = "the tree stands by the river and the leaves fall "
LOSING = ("low lines", "unigram", "word piece")


def changed(kind, change):
    """A tokenizer of a kind whose tokenizer.json has been changed."""
    content = json.loads(tokenizer_json(kind))
    change(content)
    return FileTokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), kind, kind)


def lost_of(tokenizer, text):
    return tokenizer.losses.lost(text, tokenizer.encode(text)) if tokenizer.losses else ""


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_token(kind):
    tokenizer = file_tokenizer(kind)
    lost = lost_of(tokenizer, "the tree 東 the 🌳 ée")
    assert lost == {"byte level": "", "byte fallback": "", "word piece": "東🌳"}.get(kind, "東🌳é")
    assert lost_of(tokenizer, KNOWN) == lost_of(tokenizer, "") == ""


def test_where_nothing_can_be_lost_no_text_is_looked_at():
    assert load_tokenizer("bytes").losses is None
    for kind in ("byte level", "byte fallback"):
        assert file_tokenizer(kind).losses is None
    nfc = changed("byte level", lambda content: content.update(normalizer={"type": "NFC"}))
    assert nfc.losses is None


@pytest.mark.parametrize("kind, token", [("byte level", "Ã"), ("byte fallback", "<0xC3>")])
def test_one_byte_without_a_token(kind, token):
    """é is C3 A9; Llama's kind gives its unknown token for a character of which a byte is missing."""

    def drop(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["never"] = vocabulary.pop(token)

    tokenizer = changed(kind, drop)
    assert lost_of(tokenizer, "the éé 東 tree") == "éé" and lost_of(tokenizer, KNOWN + "東\n") == ""


def test_what_is_written_otherwise_is_not_lost():
    """Lower case, accents, compatibility forms and white space between words."""
    assert lost_of(file_tokenizer("word piece"), "The TREE, the\ttree\nThé") in ("", ",")
    assert lost_of(file_tokenizer("unigram"), "the\u00a0tree ﬁre") == ""
    lines = changed("unigram", lambda c: c.update(normalizer={"type": "Lowercase"}))
    assert lost_of(lines, "THE TREE") == ""


def test_white_space_that_vanishes_is_lost():
    assert lost_of(file_tokenizer("low lines"), "the\ntree\n") == "\n\n"
    assert lost_of(file_tokenizer("word piece"), "the\x00 tree\u200d") == "\x00\u200d"


def test_an_unknown_word_is_lost_as_a_whole():
    tokenizer = file_tokenizer("word piece")
    assert lost_of(tokenizer, "the tree the3e tree") == "the3e"


@pytest.fixture
def named(tmp_path):
    """Writes tokenizers and texts, and gives their paths."""

    def write(kind, text):
        (tmp_path / "tokenizer.json").write_text(tokenizer_json(kind))
        (tmp_path / "text.txt").write_text(text)
        return str(tmp_path / "tokenizer.json"), str(tmp_path / "text.txt")

    return write


@pytest.mark.parametrize("kind", LOSING)
def test_a_whole_text(kind, named):
    """Few are no bytes, and said; many are refused, in one sentence with how many and the first."""
    tokenizer, files = named(kind, KNOWN * 20 + "東")
    said = []
    text = whole_text(files, load_tokenizer(tokenizer), log=said.append)
    assert text.bytes == len(KNOWN * 20) and text.lost == (1, len(KNOWN * 20) + 1, "東")
    assert said == [text.lost.said()] and "1 of 981 characters, the first of them '東'" in said[0]
    tokenizer, files = named(kind, KNOWN + "東京の木")
    with pytest.raises(InputError, match=rf"no token for 4 of {len(KNOWN) + 4} characters .* '東'") as error:
        whole_text(files, load_tokenizer(tokenizer))
    assert "\n" not in str(error.value)


def test_prepared_text(named, tmp_path):
    """Said when it is made and when it is found; its bytes are those of the other characters."""
    text = "\n<|endoftext|>\n".join([KNOWN * 8] * 20)
    tokenizer, files = named("unigram", text + "東")
    spec = CorpusSpec(corpus="files", files=files, tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    said = [[], []]
    made, found = (prepare(spec, 9, log.append) for log in said)
    assert sum(split["bytes"] for split in made.meta["splits"].values()) == len(text.encode()) - 15 * 19
    assert made.lost == found.lost == said[1][-1] == said[0][-1]
    assert "no token for 20 of 7,860 characters, the first of them '\\n'" in made.lost
    _, files = named("unigram", text + "東" * 99)
    with pytest.raises(InputError, match=r"^data\.tokenizer: .* no token for 118 of "):
        prepare(spec, 9, [].append)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_rows_that_others_made(kind):
    """A row's first token is no target: the space behind it counts, the unknown token does not."""
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode(KNOWN * 9).tolist()
    ids = np.array(ids[: len(ids) // 8 * 8 + 1 - (len(ids) % 8 == 0) * 8])
    rows = ids[np.arange(0, len(ids) - 8, 8)[:, None] + np.arange(9)]
    if kind == "unigram":
        rows = np.insert(rows, 4, tokenizer.losses.unknown_id, axis=1)
    scanned = _scanned(ArrayRows(rows), tokenizer, "train", lambda line: None)
    assert scanned["bytes"] == len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())


def test_far_too_many_are_refused_before_the_end():
    with pytest.raises(InputError, match="no token for 2 of 10 "):
        Lost(2, 10, "x").check("name", 0.1)
    Lost(1, 10, "x").check("name", 0.1)
    assert Lost().said() == "" and Lost(0, 3) + Lost(1, 2, "x") + Lost(1, 1, "y") == Lost(2, 6, "x")


def test_a_prompt_loses_nothing_silently():
    sizes = {"max_seq_len": 9, "width": 1, "n_layers": 1, "n_heads": 1, "ffns": (DenseSpec(1),)}
    model = lambda kind: Loaded(ModelSpec(99, **sizes), {}, file_tokenizer(kind), [], {}, "")
    with pytest.raises(InputError, match=r"^prompt: 2 of its 10 characters have no token.*'東'"):
        model("low lines").prompt("the 東 tre東")
    # An unknown token stands for it: the model reads that there is something.
    assert file_tokenizer("unigram").losses.unknown_id in model("unigram").prompt("the 東 tree")
    assert END not in model("byte fallback").tokenizer.decode(model("byte fallback").prompt("the 東"))
