"""Which token ends a text, which were added, which pads: what files say wins over names."""

import json

import pytest

from tree_ffn.data import load_tokenizer
from tree_ffn.errors import InputError

tokenizers = pytest.importorskip("tokenizers")

LETTERS = {letter: i for i, letter in enumerate("abc")}


def make(directory, special=(), ordinary=(), **files):
    """A tokenizer.json of three letters, special tokens, then ordinary added ones; JSON files beside it."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(LETTERS, []))
    engine.decoder = tokenizers.decoders.Fuse()
    engine.add_special_tokens(list(special))
    engine.add_tokens(list(ordinary))
    directory.mkdir(exist_ok=True)
    engine.save(str(directory / "tokenizer.json"))
    beside(directory, files)
    return str(directory / "tokenizer.json")


def make_pair(directory, vocabulary=LETTERS, **files):
    """The same as vocab.json and merges.txt."""
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    beside(directory, files)
    return f"{directory}/vocab.json,{directory}/merges.txt"


def beside(directory, files):
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "files, end",
    [
        ({}, "</s>"),
        ({"config": {"eos_token_id": 3}}, "<|endoftext|>"),
        ({"config": {"eos_token_id": 5}}, "<|ending|>"),
        ({"config": {"eos_token_id": [5, 3]}}, "<|ending|>"),
        (
            {"config": {"eos_token_id": [5, 3]}, "tokenizer_config": {"eos_token": "<|endoftext|>"}},
            "<|endoftext|>",
        ),
        ({"config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|ending|>"),
        ({"generation_config": {"eos_token_id": 5}}, "<|ending|>"),
        (
            {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [5]},
             "special_tokens_map": {"eos_token": "<|ending|>"}}, "<|ending|>",
        ),
        ({"tokenizer_config": {"eos_token": {"content": "<|ending|>"}}}, "<|ending|>"),
        ({"special_tokens_map": {"eos_token": "<|ending|>"}}, "<|ending|>"),
        # GPT-2's id in the config of a model with fewer rows, and an ordinary token: no ends.
        ({"config": {"eos_token_id": 50256, "vocab_size": 6}}, "</s>"),
        ({"config": {"eos_token_id": 1}}, "</s>"),
        ({"config": {"eos_token_id": None}}, "</s>"),
        ({"config": {"format": "tree_ffn", "meta": {"end_id": 5}, "model": {"vocab_size": 6}}}, "<|ending|>"),
    ],
)  # fmt: skip
def test_the_end_is_what_files_say(tmp_path, files, end):
    found = load_tokenizer(make(tmp_path, ["<|endoftext|>", "</s>", "<|ending|>"], **files))
    assert (found.end_token, found.end_id) == (end, {"<|endoftext|>": 3, "</s>": 4, "<|ending|>": 5}[end])
    assert found.decode([0, found.end_id, 1]) == "ab"


def test_an_end_of_another_name_needs_a_file_that_says_it(tmp_path):
    path = make(tmp_path / "a", ["<|ending|>"])
    with pytest.raises(
        InputError, match="has no end token; .* or a tokenizer_config.json that says its eos_token"
    ):
        load_tokenizer(path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"eos_token_id": 3}')
    assert load_tokenizer(path, str(model)).end_token == "<|ending|>"


def test_another_end_is_another_fingerprint(tmp_path):
    names = ["</s>", "<|endoftext|>"]
    plain = load_tokenizer(make(tmp_path / "a", names)).fingerprint
    assert load_tokenizer(make(tmp_path / "b", names, config={"eos_token_id": 3})).fingerprint == plain
    assert load_tokenizer(make(tmp_path / "c", names, config={"eos_token_id": 4})).fingerprint != plain


@pytest.mark.parametrize("kind", [make_pair, make])
def test_added_tokens_are_taken_with_their_flags(tmp_path, kind):
    first = {"vocabulary": LETTERS | {"</s>": 3}} if kind is make_pair else {"special": ["</s>"]}
    plain = load_tokenizer(kind(tmp_path / "plain", **first))
    files = {
        "added_tokens": {"<sep>": 4, "<user>": 5},
        "tokenizer_config": {
            "added_tokens_decoder": {
                "5": {"content": "<user>", "special": True},
                "6": {"content": "<bot>", "special": False, "lstrip": True},
            }
        },
    }
    found = load_tokenizer(kind(tmp_path / "added", **first, **files))
    assert (plain.vocab_size, found.vocab_size) == (4, 7)
    assert found.fingerprint != plain.fingerprint
    assert found.encode("a<sep>b").tolist() == [0, 4, 1]
    assert 5 not in found.encode("a<user>b") and found.encode("a <bot>b").tolist()[-2:] == [6, 1]
    assert found.decode([0, 4, 5, 6, 1]) == "a<sep><bot>b"


def test_tokens_of_added_tokens_json_that_are_named_as_special_are(tmp_path):
    files = {
        "added_tokens": {"<x>": 4, "<y>": 5},
        "special_tokens_map": {"additional_special_tokens": ["<y>"]},
    }
    found = load_tokenizer(make_pair(tmp_path, LETTERS | {"</s>": 3}, **files))
    assert found.decode([4, 5]) == "<x>"


@pytest.mark.parametrize(
    "files, words",
    [
        ({"added_tokens": {"<x>": 1}}, "the added token '<x>' has the id 1 by its file, but .* that is 'b'"),
        (
            {"added_tokens": {"c": 9}},
            "the added token 'c' has the id 9 .* the token's id is 2; make them agree",
        ),
        ({"added_tokens": {"<x>": -1}}, "added_tokens.json' gives '<x>' the id -1; an id is a whole number"),
        ({"added_tokens": ["<x>"]}, "added_tokens.json' is no JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "<x>"}}}, "has the entry 'x', which is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: "<x>"}}}, "has the entry .9999"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {}}}}, "has the entry '9', which is no id"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, files, words):
    with pytest.raises(InputError, match=f"^data.tokenizer: .*{words}"):
        load_tokenizer(make_pair(tmp_path, LETTERS | {"</s>": 3}, **files))


def test_an_added_token_of_a_tokenizer_json_has_the_next_id(tmp_path):
    with pytest.raises(InputError, match="'<x>' has the id 9 by the files beside tokenizer.json, and 4 as"):
        load_tokenizer(make(tmp_path, ["</s>"], added_tokens={"<x>": 9}))


@pytest.mark.parametrize("name", ["[PAD]", "<pad>", "<|pad|>", "fill"])
@pytest.mark.parametrize("where", ["special", "ordinary", "added_tokens"])
def test_a_pad_without_a_row_is_left_out(tmp_path, name, where):
    """It is neither read nor made, whatever a text spells; with a row it stays."""
    files = {"tokenizer_config": {"pad_token": name}, "config": {"vocab_size": 4}}
    given = {"ordinary": [name]} if where == "ordinary" else {"special": ["</s>", name]}
    if where != "special":
        given["special"] = ["</s>"]
    more = {"added_tokens": {name: 4}} if where == "added_tokens" else {}
    found = load_tokenizer(make(tmp_path / "a", **given, **files, **more))
    assert found.vocab_size == 4 and max(found.encode(f"a{name}b"), default=0) < 4
    assert found.decode([0, 4]) == "a"
    files["config"]["vocab_size"] = 5
    assert load_tokenizer(make(tmp_path / "b", **given, **files, **more)).vocab_size == 5


def test_other_tokens_without_a_row_stay_and_do_not_fit(tmp_path):
    assert load_tokenizer(make(tmp_path, ["</s>", "<x>"], config={"vocab_size": 4})).vocab_size == 5


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pair = make_pair(tmp_path, LETTERS | {"</s>": 3})
    path = make(tmp_path, ["</s>"])
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(InputError, match=f"{name}'? is a pointer of git-lfs, not the file"):
        load_tokenizer(path if name.startswith("tokenizer") else pair)
