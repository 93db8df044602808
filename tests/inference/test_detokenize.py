"""Text that arrives token by token: no half characters, and it ends before a stop string."""

import pytest
import tokenizers

from tests.data.kinds_of_tokenizers import KINDS, TEXTS, file_tokenizer, tokenizer_json
from tree_ffn.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer
from tree_ffn.inference.detokenize import Characters, TextStream, first_stop

TEXT = "Zoë née 東京 🌳\u200d🌳 \U0001f468\u200d👩 ende"


class Chunks(Tokenizer):
    """Tokens of several bytes each, cut anywhere."""

    end_id = -1

    def __init__(self, chunks):
        self.chunks = chunks

    def encode_batch(self, texts):
        raise NotImplementedError

    def is_text(self, token):
        return token >= 0

    def piece(self, token, before=None):
        return self.chunks[token]


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
    assert pieces[:4] == ["a", "\ufffd", "\ufffd", "b"]
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


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def behind(tokenizer, ids, n):
    """The text of ids[n:] behind ids[:n], as it comes."""
    characters = Characters(tokenizer, ids[:n])
    return "".join([*map(characters.push, ids[n:]), characters.rest()])


@pytest.mark.parametrize("text", [*TEXTS, " the tree", "the  tree \n stands", "東京の木 🌳🌳", "e\u0301 né"])
def test_text_behind_any_prompt_is_what_the_whole_has_more(kind, text):
    """Cut at every token: the space before a word is kept, a character comes with its last token."""
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode(text).tolist()
    whole = tokenizer.decode(ids)
    assert kind not in ("byte level", "byte fallback") or whole == text
    for n in range(len(ids) + 1):
        read = Characters(tokenizer)
        prompt = "".join(map(read.push, ids[:n]))
        assert whole.startswith(prompt) and prompt + behind(tokenizer, ids, n) == whole
        if n and not read.rest():
            assert prompt == tokenizer.decode(ids[:n])


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_half_characters_of_files_tokenizers(kind):
    """Cut off behind any of its tokens, an emoji is one U+FFFD at the end, and nothing before."""
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode("the 🌳").tolist()
    for n in range(1, 4):
        pieces, _ = streamed(tokenizer, ids[:-n])
        assert "".join(pieces) == "the \ufffd" == tokenizer.decode(ids[:-n]) and pieces[-1] == "\ufffd"
    # A whole character in front of the half one stays, and the end token ends the text.
    tail = [*tokenizer.encode("東木").tolist()[:-1], tokenizer.end_id]
    assert "".join(streamed(tokenizer, tail)[0]).strip() == "東\ufffd"
    # What can become no character delays nothing.
    assert streamed(tokenizer, [*ids[-4:-2], *ids[:1]])[0][2].startswith("\ufffd")


def test_a_byte_that_is_a_space_begins_a_text_as_the_library_has_it():
    tokenizer = file_tokenizer("byte fallback")
    space, a = (tokenizer.engine.token_to_id(token) for token in ("<0x20>", "<0x61>"))
    for ids in ([space, a], [space, space, a], [a, space]):
        assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.engine.decode(ids) == tokenizer.decode(ids)


def test_the_library_s_own_stream_does_not_do_it():
    """Why `Characters` is ours: half a character behind a whole one ends the library's in an error."""
    from tokenizers.decoders import DecodeStream

    tokenizer = file_tokenizer("byte fallback")
    ids = [*tokenizer.encode("東木").tolist()[:-1], *tokenizer.encode("the").tolist()]
    stream = DecodeStream(ids=tokenizer.encode("the").tolist(), skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        for token in ids:
            stream.step(tokenizer.engine, token)
    assert behind(tokenizer, ids, 0).strip() == "東\ufffd the"


def test_special_tokens_are_no_text(kind):
    tokenizer = file_tokenizer(kind)
    the, tree = (tokenizer.encode(text).tolist() for text in ("the", "the tree"))
    assert behind(tokenizer, [*the, *(tokenizer.end_id,) * 9, *tree[len(the) :]], len(the) + 9) == " tree"
    assert behind(tokenizer, [tokenizer.end_id, *tree], 1) == "the tree"
    assert tokenizer.decode([-1, *tree, tokenizer.end_id, 10**6]) == "the tree"


def test_added_tokens_of_byte_level_tokenizers_are_as_they_are_written():
    """The library takes the letters of `né` for two bytes, which are no character."""
    made = tokenizers.Tokenizer.from_str(tokenizer_json("byte level"))
    made.add_tokens(["né", " the  tree", "Ġby"])
    tokenizer = FileTokenizer(made, "added", "added")
    assert "\ufffd" in made.decode(tokenizer.encode("né").tolist())
    for text in ("né", "a né the  tree, né🌳"):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text == "".join(streamed(tokenizer, ids)[0])
    assert tokenizer.piece(made.token_to_id("Ġby")) == b" by"


def test_a_stop_spans_tokens(kind):
    tokenizer = file_tokenizer(kind)
    ids = tokenizer.encode("the tree by the river").tolist()
    n = len(tokenizer.encode("the").tolist())
    stream = TextStream(tokenizer, ["e by t", "never"], ids[:n])
    assert "".join(map(stream.push, ids[n:])) == " tre" and stream.stopped


def test_a_token_costs_the_same_wherever_it_stands():
    """The library is asked for two tokens at a time, however long the text and its half characters."""
    tokenizer, asked = file_tokenizer("byte fallback"), []
    engine = tokenizer.engine

    class Watched:
        id_to_token = staticmethod(engine.id_to_token)

        def decode(self, ids):
            asked.append(len(ids))
            return engine.decode(ids)

    tokenizer.engine = Watched()
    half = engine.token_to_id("<0xF0>")
    pieces, _ = streamed(tokenizer, [*tokenizer_ids(engine, "the tree"), *[half] * 300], ["zz"])
    assert "".join(pieces) == "the tree" + "\ufffd" * 300 and max(asked) <= 2


def tokenizer_ids(engine, text):
    return engine.encode(text, add_special_tokens=False).ids
