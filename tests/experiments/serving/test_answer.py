"""The text, the tokens and the offsets of an answer, in tokens of every kind; no model is needed."""

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs fastapi; the extra dev brings it")

from experiments.common.loaded import Loaded
from experiments.serving.answer import Choice, joined
from experiments.serving.completion import parse
from tests.data.kinds_of_tokenizers import KINDS, file_tokenizer
from tree_ffn.inference.batching import Made
from tree_ffn.inference.scoring import TokenScores
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.spec import ModelSpec

TEXT = "the tree 東 the 🌳 leaves fall"


def answered(kind, text, n_prompt, stops=(), echo=True, n_end=0):
    """The pieces of an answer that makes the tokens of a text behind the first `n_prompt` of them."""
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode(text).tolist()
    ids = ids[: len(ids) - n_end]
    prompt, new = tuple(ids[:n_prompt]), ids[n_prompt:]
    spec = ModelSpec(
        vocab_size=tokenizer.vocab_size, max_seq_len=99, width=1, n_layers=1, n_heads=1, ffns=(DenseSpec(1),)
    )
    body = {"prompt": list(prompt), "echo": echo, "logprobs": 1, "max_tokens": len(new), "stop": list(stops)}
    asked = parse(body, Loaded(spec, {}, tokenizer, [], {}, "tiny"), "tiny", 1)
    request = asked.requests[0]
    scores = TokenScores(np.zeros(n_prompt), np.full((n_prompt, 1), ids[0]), np.zeros((n_prompt, 1)))
    choice = Choice(asked, 0, tokenizer)
    return (
        tokenizer,
        ids,
        [
            choice.push(
                Made(request, token, scores.at(0), scores if echo and not i else None, i + 1 == len(new))
            )
            for i, token in enumerate(new)
            if not choice.finished
        ],
    )


def plain(tokens):
    """The bytes of tokens as a client puts them together."""
    is_half = lambda one: one.startswith("bytes:\\x")
    return b"".join(
        bytes.fromhex(one[6:].replace("\\x", "")) if is_half(one) else one.encode() for one in tokens
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prompt", [1, 2, 3, 5])
def test_tokens_and_offsets_make_up_the_text(kind, n_prompt):
    tokenizer, ids, pieces = answered(kind, TEXT, n_prompt)
    whole = joined(pieces)
    assert whole["text"] == tokenizer.decode(ids) and whole["finish_reason"] == "length"
    names, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    shown = [name for name in names if not name.startswith("token_id:")]  # the unknown token is no text
    assert len(names) == len(ids) and plain(shown).decode() == whole["text"]
    for name, offset in zip(names, offsets):
        if not name.startswith(("bytes:", "token_id:")):
            assert whole["text"][offset : offset + len(name)] == name
    before = [0, *np.cumsum([len(piece["text"]) for piece in pieces])]
    for piece, start, end in zip(pieces[:-1], before, before[1:]):
        assert "\ufffd" not in piece["text"]
        assert all(start <= one < end or end == start for one in piece["logprobs"]["text_offset"])


def test_without_echo_the_first_space_is_kept():
    for kind in KINDS:
        n = len(file_tokenizer(kind).encode("the"))
        assert joined(answered(kind, "the tree", n, echo=False)[2])["text"] == " tree"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_an_end_in_mid_character_is_shown_once(kind):
    tokenizer, ids, pieces = answered(kind, "the tree 🌳", 2, n_end=1)
    assert joined(pieces)["text"] == "the tree \ufffd" == tokenizer.decode(ids)
    assert pieces[-1]["text"].endswith("\ufffd") and pieces[-1]["logprobs"]["tokens"][-1].startswith("bytes:")
