"""Text as its tokens arrive: whole characters only, and none that begin a stop string."""

import codecs
import itertools
from collections.abc import Container, Iterable, Sequence

from tree_ffn.data.tokenizers import Tokenizer

# A character has four bytes at most, so its first one is not further back.
_OPEN = 4


class Characters:
    """The text that each token adds; a character that takes several tokens comes with its last.

    Every token costs the same, and bytes that are no character give U+FFFD. The library's
    `DecodeStream` has no last word for a half character, and fails when one follows a whole one.

    Args:
      tokenizer: of the tokens.
      context: the tokens before; their text is not given again. A character that they begin is
        given when it ends.

    Attributes:
      before: the last token of text; None at the beginning.

    Example:
      >>> from tree_ffn.data.tokenizers import ByteTokenizer
      >>> characters = Characters(ByteTokenizer())
      >>> [characters.push(byte) for byte in "né".encode()], characters.rest()
      (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.before: int | None = None
        shown = filter(tokenizer.is_text, map(int, reversed(context)))
        for token in reversed(list(itertools.islice(shown, _OPEN))):
            self.push(token)

    def push(self, token: int) -> str:
        """What is certain now."""
        token = int(token)
        if not self._tokenizer.is_text(token):
            return ""
        piece, self.before = self._tokenizer.piece(token, self.before), token
        return self._utf8.decode(piece)

    def rest(self) -> str:
        """What is left when no token follows: a replacement character for a half one."""
        return self._utf8.decode(b"", final=True)


class TextStream:
    """Text up to the first stop string that is complete; the stop string is not part of it.

    Of several, the one that ends first counts, and of those that end together the longest: where the
    borders of tokens lie makes no difference.

    Args:
      tokenizer: of the tokens.
      stops: strings, none of them empty.
      context: the tokens before, as of `Characters`.
      ends: tokens that stop the text too and are no part of it; None: the tokenizer's end token.

    Attributes:
      stopped: nothing more comes.

    Example:
      >>> from tree_ffn.data.tokenizers import ByteTokenizer
      >>> stream = TextStream(ByteTokenizer(), ["--"])
      >>> [stream.push(byte) for byte in b"a-b--c"], stream.stopped
      (['a', '', '-b', '', '', ''], True)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Iterable[str] = (),
        context: Sequence[int] = (),
        ends: Container[int] | None = None,
    ):
        self._characters = Characters(tokenizer, context)
        self._ends = {tokenizer.end_id} if ends is None else ends
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    @property
    def before(self) -> int | None:
        """The last token of text; None at the beginning."""
        return self._characters.before

    @property
    def n_held(self) -> int:
        """Characters held back, as they may begin a stop string."""
        return len(self._held)

    def push(self, token: int) -> str:
        """The text that is certain now, after one more token."""
        if self.stopped:
            return ""
        if token in self._ends:
            text = self.rest()
            self.stopped = True
            return text
        return self._sift(self._characters.push(token))

    def rest(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._sift(self._characters.rest())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _sift(self, new: str) -> str:
        text, self._held = self._held + new, ""
        place = first_stop(text, self._stops)
        if place is not None:
            self.stopped = True
            return text[:place]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; None if none is.

    Example:
      >>> first_stop("one two", ["two", "ne "]), first_stop("one", ["two"])
      (1, None)
    """
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may have begun."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
