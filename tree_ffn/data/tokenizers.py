"""Text to token ids and back: raw bytes, or byte-pair vocabularies from files."""

import abc
import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tree_ffn.data.compressed import plain_name, read_bytes
from tree_ffn.data.lost import HALF, Losses, byte_alphabet, kinds_in
from tree_ffn.data.special_tokens import END_TOKENS, NOTHING, Added, Said, said_beside
from tree_ffn.errors import InputError, reason
from tree_ffn.json_input import parse_object
from tree_ffn.paths import local, split_at_commas

# A byte as the tokenizers of Llama's kind write it, where they have no token for a character.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

ALLOWED = (
    "'bytes', the path of a tokenizer.json, or two paths 'vocab.json,merges.bpe' (.gz, .xz, .zst allowed)"
)


class Tokenizer(abc.ABC):
    """Text to ids and back; `end_id` ends a document and is never text.

    Attributes:
      vocab_size: V; every id is below it.
      end_id: the token put after each document.
      end_token: how that token is written.
      name: a short name without any path.
      fingerprint: sha256 of what defines the ids.
      losses: finds characters that have no token; None where every character has.
    """

    vocab_size: int
    end_id: int
    end_token: str
    name: str
    fingerprint: str
    losses: Losses | None = None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 arrays; no special tokens are added or recognised."""

    @abc.abstractmethod
    def is_text(self, token: int) -> bool:
        """Whether a token stands for text; the end, other special tokens and unused ids do not."""

    @abc.abstractmethod
    def piece(self, token: int, before: int | None = None) -> bytes:
        """The UTF-8 bytes that a token of text adds; they may be a part of a character.

        Args:
          token: its id.
          before: the token of text before it; None where the text begins. There tokenizers of
            SentencePiece's kind leave out the space before a word.
        """

    def pieces(self, ids: Iterable[int], before: int | None = None) -> Iterator[bytes]:
        """What each token of text adds, one behind the other."""
        for token in filter(self.is_text, map(int, ids)):
            yield self.piece(token, before)
            before = token

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; what is no token of text gives nothing, what is no character U+FFFD."""
        return b"".join(self.pieces(ids)).decode(errors="replace")

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32 [n]."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> np.ndarray:
        """The ids of a text that spells its special tokens, as chat templates do: int32 [n].

        Example:
          >>> ByteTokenizer().encode_marked("a<|endoftext|>").tolist()
          [97, 256]
        """
        first, *others = self.encode_batch(text.split(self.end_token))
        end = np.asarray([self.end_id], np.int32)
        return np.concatenate([first, *(part for other in others for part in (end, other))])


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, and 256 to end a document.

    Example:
      >>> ByteTokenizer().encode("né").tolist()
      [110, 195, 169]
    """

    vocab_size = 257
    end_id = 256
    end_token = "<|endoftext|>"
    name = "bytes"
    fingerprint = hashlib.sha256(b"UTF-8 bytes, end of document 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def is_text(self, token: int) -> bool:
        return 0 <= token < 256

    def piece(self, token: int, before: int | None = None) -> bytes:
        return bytes([token])


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, which encodes on all cores.

    Args:
      engine: a `tokenizers.Tokenizer`.
      name, fingerprint: as in `Tokenizer`.
      said: of its tokens, by the files beside it.
    """

    def __init__(self, engine, name: str, fingerprint: str, said: Said = NOTHING):
        engine.no_truncation()
        engine.no_padding()
        # Text that spells a special token is still text.
        engine.encode_special_tokens = True
        vocabulary = engine.get_vocab(with_added_tokens=True)
        added = engine.get_added_tokens_decoder()
        end = said.end_of(vocabulary, [how.content for how in added.values()])
        if end is None:
            raise InputError(
                f"data.tokenizer: {name!r} has no end token; it needs one of {', '.join(END_TOKENS)}, or a "
                "tokenizer_config.json that says its eos_token."
            )
        self.engine, self.name, self.fingerprint = engine, name, fingerprint
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id, self.end_token = vocabulary[end], end
        self.begin_id = vocabulary.get(said.begin) if said.begin else None
        self._added = frozenset(added)
        self._not_text = {self.end_id, *(token for token, how in added.items() if how.special)}
        parts = kinds_in(engine.decoder)
        self._has_byte_tokens = "ByteFallback" in parts
        self._bytes_of = byte_alphabet() if "ByteLevel" in parts else {}
        losses = Losses(engine, vocabulary)
        self.losses = None if losses.none else losses

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with library_errors(f"{self.name!r} cannot encode the text"):
            encoded = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def encode_marked(self, text: str) -> np.ndarray:
        with library_errors(f"{self.name!r} cannot encode the text"):
            return np.asarray(self._marking.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _marking(self):
        """The same engine, for which special tokens are tokens."""
        engine = type(self.engine).from_str(self.engine.to_str())
        engine.encode_special_tokens = False
        engine.add_special_tokens([self.end_token])  # vocabularies of two files do not say that it is special
        return engine

    def is_text(self, token: int) -> bool:
        return token not in self._not_text and token >= 0 and self.engine.id_to_token(token) is not None

    def piece(self, token: int, before: int | None = None) -> bytes:
        written = self.engine.id_to_token(token)
        if self._bytes_of:
            found = bytes(self._bytes_of.get(letter, 0xFF) for letter in written)
            # Added tokens are written as they are; some libraries' users write them as the others are.
            as_it_is = any(letter not in self._bytes_of for letter in written) or (
                token in self._added and HALF in found.decode(errors="replace")
            )
            return written.encode() if as_it_is else found
        if self._has_byte_tokens and (match := BYTE_TOKEN.fullmatch(written)):
            byte = int(match[1], 16)
            if before is not None or byte >= 0x80:  # a space that begins a text may be left out, as below
                return bytes([byte])
        if before is None:
            return self.engine.decode([token]).encode()
        # A word's space and the like depend on whether something stands before, not on what.
        return self.engine.decode([before, token]).removeprefix(self.engine.decode([before])).encode()

    def decode(self, ids: Iterable[int]) -> str:
        kept = [token for token in map(int, ids) if self.is_text(token)]
        text = self.engine.decode(kept)
        # Of a run of byte tokens with one half character the library makes nothing but U+FFFD.
        return super().decode(kept) if HALF in text else text


@contextlib.contextmanager
def library_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turns what the library raises into an InputError: bare Exception, and of Rust's panics no Exception."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"data.tokenizer: {what} ({reason(error)}){advice}.") from error


@contextlib.contextmanager
def _silent_panics() -> Iterator[None]:
    """Keeps what Rust writes of a panic from the terminal; the exception says it again."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed: nobody reads it
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def load_tokenizer(text: str, model: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    What the files beside it say of its tokens counts (see `special_tokens.py`): added tokens are added, the
    end is the model's, a pad that the model has no row for is left out.

    Args:
      text: `bytes`; the path of a tokenizer.json; or two paths joined by a
        comma, a vocabulary (GPT-2's encoder.json, OPT's gpt2-vocab.json) and
        its merges (vocab.bpe, merges.txt). Files may be packed (.xz, .gz, .zst).
      model: directory of the model whose config.json counts, if it is not the tokenizer's.

    Raises:
      InputError: the name is not known, or a file is not such a tokenizer.

    Example:
      >>> load_tokenizer("bytes").vocab_size
      257
    """
    if text == "bytes":
        return ByteTokenizer()
    paths = [Path(local(part, "data.tokenizer")) for part in split_at_commas(text)]
    names = [plain_name(path) for path in paths] or [""]
    if len(paths) > 2 or not names[0].endswith(".json"):
        raise InputError(f"data.tokenizer: {text!r} is not known; use {ALLOWED}.")
    for path in paths:
        if not path.is_file():
            raise InputError(f"data.tokenizer: {str(path)!r} is not a file; use {ALLOWED}.")
    contents = [read_bytes(path).removeprefix(codecs.BOM_UTF8) for path in paths]
    said = said_beside(paths[0].parent, Path(model or paths[0].parent))
    build = _from_tokenizer_json if len(paths) == 1 else _from_vocab_and_merges
    with library_errors(f"{text!r} cannot be used", f"; use {ALLOWED}"), _silent_panics():
        engine, changed = build(said, *contents)
        found = FileTokenizer(engine, "+".join(names), "", said)
    digest = hashlib.sha256(b"".join(contents))
    if changed or found.end_token != NOTHING.end_of(engine.get_vocab(with_added_tokens=True)):
        digest.update(json.dumps([found.end_id, changed]).encode())
    found.fingerprint = digest.hexdigest()
    return found


def _from_tokenizer_json(said: Said, content: bytes):
    """The engine, and what the files beside it changed."""
    tokenizers = _library()
    engine = tokenizers.Tokenizer.from_buffer(content)
    vocabulary = engine.get_vocab(with_added_tokens=True)
    new = said.new_tokens(vocabulary)
    left_out = [token for token, number in vocabulary.items() if said.is_rowless_pad(token, number)]
    if left_out:
        state = parse_object(content, "tokenizer.json")
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in left_out]
        engine = tokenizers.Tokenizer.from_str(json.dumps(state))
    _add(engine, new)
    for one in new:
        if (number := engine.token_to_id(one.content)) != one.id:
            raise InputError(
                f"data.tokenizer: the added token {one.content!r} has the id {one.id} by the files beside "
                f"tokenizer.json, and {number} as the next one there; ids have to follow each other."
            )
    return engine, [*left_out, *new]


def _add(engine, tokens: Iterable[Added]):
    for one in tokens:
        token = _library().AddedToken(one.content, **{"normalized": False, **one.flags})
        engine.add_special_tokens([token]) if one.special else engine.add_tokens([token])


def _from_vocab_and_merges(said: Said, vocabulary: bytes, merges: bytes):
    """GPT-2's byte-level BPE from its two files (Radford et al., 2019), and what was added to them."""
    tokenizers = _library()
    vocab = parse_object(vocabulary, "data.tokenizer: the vocabulary")
    new = said.new_tokens(vocab)
    known = [one for one in said.added if one.content in vocab]
    lines = merges.decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab | {one.content: one.id for one in new}, merges=pairs)
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    _add(engine, [*known, *new])
    return engine, [*new, *(one for one in known if not one.special)]


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("data.tokenizer: files need the package tokenizers; install it.") from error
    return tokenizers
