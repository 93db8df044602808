"""Characters that a tokenizer loses: no token comes from them, or only the unknown one.

Bits per byte count the bytes that tokens predict, so these must not be among them. What a normalizer
writes in another way (lower case, NFKC) is not lost: its bytes count as they stand in the text. Nor is
white space of which a tokenizer of words makes one border.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from tree_ffn.errors import InputError

# What decoders put where bytes are no character.
HALF = "\ufffd"
# A text of which more is lost is refused: its metrics would be those of another text.
MOST_LOST = 0.01
# So much is lost of the beginning that the rest need not be waited for.
MOST_LOST_EARLY = 0.1
# What tokenizers like to leave out, white space, controls, accents and marks; and what will never be a
# character, so that no vocabulary has a token for it.
_TRIAL = "e  e\n\n\te\r\n\x00\x7f é \u200d\x85 東🌳\U0010ffffe"


class Losses:
    """Finds what a tokenizer of the library loses.

    Args:
      engine: a `tokenizers.Tokenizer`.
      vocabulary: its ids by token.

    Attributes:
      unknown_id: the token of what is not known, or None.
      none: nothing can be lost, and no text is looked at.
    """

    def __init__(self, engine, vocabulary: Mapping[str, int]):
        self._engine, self._is_dropped = engine, {}
        self.unknown_id = unknown_id(engine.model)
        letters = [f"<0x{byte:02X}>" for byte in range(256)]
        if "ByteLevel" in kinds_in(engine.pre_tokenizer, engine.normalizer):
            letters = list(byte_alphabet())
        has_bytes = all(letter in vocabulary for letter in letters)
        self.none = has_bytes and engine.decode(self._ids(_TRIAL)).strip() == _TRIAL

    def dropped(self, text: str) -> str:
        """The characters of a text from which no token comes, in their order."""
        if self.none:
            return ""
        for character in set(text).difference(self._is_dropped):
            self._is_dropped[character] = self._drops(character)
        gone = {character for character in set(text) if self._is_dropped[character]}
        return "".join(character for character in text if character in gone) if gone else ""

    def lost(self, text: str, ids) -> str:
        """The characters of a text that are dropped or unknown, in their order; `ids` are its tokens."""
        dropped = self.dropped(text)
        if self.none or self.unknown_id is None or self.unknown_id not in ids:
            return dropped
        encoded = self._engine.encode(text, add_special_tokens=False)
        found = zip(encoded.ids, encoded.offsets)
        places = {i for token, (a, b) in found if token == self.unknown_id for i in range(a, b)}
        return "".join(one for i, one in enumerate(text) if i in places or self._is_dropped[one])

    def _ids(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def _drops(self, character: str) -> bool:
        alone = self._ids(character)
        if self.unknown_id in alone:
            return False
        text = self._engine.decode(alone)
        if HALF in text:  # some of its bytes have no token
            return character != HALF
        # White space may part words and have no token of its own.
        return not text.strip() and self._ids(f"e{character}e") == self._ids("ee")


def unknown_id(model) -> int | None:
    """The token for what a model of the library does not know; None if it has none."""
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else model.token_to_id(model.unk_token)
    return json.loads(model.__getstate__()).get("unk_id")  # Unigram tells it nowhere else


class Lost(NamedTuple):
    """How much of a text is lost.

    Attributes:
      n: characters.
      of: characters of the text.
      first: the first of them, if there is one.
    """

    n: int = 0
    of: int = 0
    first: str = ""

    def __add__(self, other: "Lost") -> "Lost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Lost(self.n + other.n, self.of + other.of, self.first or other.first)

    def check(self, tokenizer: str, most: float = MOST_LOST) -> None:
        """Raises InputError if more than this share is lost."""
        if self.n > most * self.of:
            raise InputError(
                f"data.tokenizer: {tokenizer!r} has no token for {self.n:,} of {self.of:,} characters of the "
                f"text, the first of them {self.first!r}, and bits per byte would be wrong; use a tokenizer "
                "that has a token for every byte, or other text."
            )

    @classmethod
    def count(cls, losses: Losses | None, text: str, ids) -> tuple["Lost", int]:
        """What is lost of a text with these tokens, and the UTF-8 bytes of the rest.

        Args:
          losses: of the tokenizer; None where nothing can be lost.
          text: what was tokenised.
          ids: its tokens.
        """
        lost = losses.lost(text, ids) if losses else ""
        return cls(len(lost), len(text), lost[:1]), len(text.encode()) - len(lost.encode())

    def said(self) -> str:
        """A line for people; empty if nothing is lost."""
        if not self.n:
            return ""
        return (
            f"the tokenizer has no token for {self.n:,} of {self.of:,} characters, the first of them "
            f"{self.first!r}: bits per byte do not count their bytes"
        )


def kinds_in(*parts) -> set[str]:
    """The kinds that a tokenizer's parts (normalizer, decoder ...) are made of; None is made of none."""
    kinds, left = set(), [json.loads(part.__getstate__()) for part in parts if part]
    while left:
        state = left.pop()
        kinds.add(state["type"])
        inner = (values for values in state.values() if isinstance(values, list))
        left += [one for values in inner for one in values if isinstance(one, dict) and "type" in one]
    return kinds


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer stands for (Radford et al., 2019).

    Example:
      >>> byte_alphabet()["a"], byte_alphabet()["Ġ"]
      (97, 32)
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    alphabet = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | dict(zip(letters[len(alphabet) :], others))
