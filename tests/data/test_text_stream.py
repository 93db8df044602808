"""Text that arrives token by token: no half characters, and it ends before a stop string."""

import pytest

from tree_ffn.data.text_stream import TextStream, first_stop
from tree_ffn.data.tokenizers import ByteTokenizer, Tokenizer

TEXT = "Zoë née 東京 🌳\u200d🌳 \U0001f468\u200d👩 ende"


class Chunks(Tokenizer):
    """Tokens of several bytes each, cut anywhere."""

    end_id = -1

    def __init__(self, chunks):
        self.chunks = chunks

    def encode_batch(self, texts):
        raise NotImplementedError

    def decode(self, ids):
        return b"".join(self.chunks[i] for i in ids).decode(errors="replace")


def streamed(tokenizer, ids, stops=()):
    """(pieces, whether it stopped)."""
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.rest()], stream.stopped


def test_whole_characters_only():
    pieces, stopped = streamed(ByteTokenizer(), TEXT.encode())
    assert "".join(pieces) == TEXT and not stopped
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_is_no_text_is_shown_as_such_and_delays_nothing():
    broken = b"a\xff\xffb\xe2\x82" + "€\ufffd".encode()
    pieces, _ = streamed(ByteTokenizer(), broken)
    assert "".join(pieces) == broken.decode(errors="replace")
    assert pieces[:4] == ["a", "", "\ufffd", "\ufffdb"]
    assert streamed(ByteTokenizer(), b"x\xf0\x9f")[0] == ["x", "", "", "\ufffd"]


def test_the_end_token_ends_the_text():
    pieces, stopped = streamed(ByteTokenizer(), [*b"ab\xc3", 256, *b"cd"])
    assert "".join(pieces) == "ab\ufffd" and stopped


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two", ["two"], "one "),
        ("one two", ["tw", "e t"], "on"),
        ("aaab", ["aab"], "a"),
        ("aaab", ["b", "ab"], "aa"),  # they end together: the longer one
        ("abcX", ["abcX", "bc"], "a"),  # the one that ends first
        ("ababa", ["abac"], "ababa"),
        ("née", ["é"], "n"),
        ("x\n\nQ:", ["\n\n"], "x"),
        ("stop", ["stop"], ""),
        ("none", ["nonesuch"], "none"),
    ],
)
def test_stops_wherever_the_tokens_are_cut(text, stops, expected):
    content = text.encode()
    for cuts in range(2 ** (len(content) - 1)):
        borders = [0, *(i for i in range(1, len(content)) if cuts >> (i - 1) & 1), len(content)]
        chunks = [content[a:b] for a, b in zip(borders, borders[1:])]
        pieces, stopped = streamed(Chunks(chunks), range(len(chunks)), stops)
        assert "".join(pieces) == expected
        assert stopped == (expected != text)


def test_nothing_is_held_back_without_need():
    pieces, _ = streamed(ByteTokenizer(), b"a-b-->c", ["-->", "zz"])
    assert pieces == ["a", "", "-b", *[""] * 5]
    assert first_stop("a-b-->c", ["-->", "zz"]) == 3
