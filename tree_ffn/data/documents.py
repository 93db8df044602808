"""Text into documents, and documents into segments of bounded size."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SEGMENT_CHARS = 1 << 14
_END_LINE = re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)
_END_LINE_CHARS = len("<|endoftext|>\r\n")


class Segment(NamedTuple):
    """A run of text inside one document, small enough to tokenise at once.

    Attributes:
      text: the characters.
      ends: whether the document ends here.
      key: where it ends, 64 bits of a hash that decides the document's split;
        0 elsewhere.
    """

    text: str
    ends: bool
    key: int


def documents(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cuts a stream of text at every line that is exactly `<|endoftext|>`.

    Yields:
      (text, ends): a piece of a document, and whether the document ends with
      it. The separating lines themselves are in no piece. The last document
      ends with the stream.
    """
    held, inside_line = "", False
    for text in itertools.chain(texts, [""]):
        buffer = held + text
        # An unfinished last line waits while it can still become an end line.
        line = buffer.rfind("\n") + 1
        ready = line if text and len(buffer) - line < _END_LINE_CHARS else len(buffer)
        start = 0
        for match in _END_LINE.finditer(buffer, 0, ready):
            if inside_line and match.start() == 0:
                continue
            yield buffer[start : match.start()], True
            start = match.end()
        if start < ready:
            yield buffer[start:ready], False
        inside_line = buffer[ready - 1] != "\n" if ready else inside_line
        held = buffer[ready:]
    yield "", True


def segments(pieces: Iterable[tuple[str, bool]], key: int | None = None) -> Iterator[Segment]:
    """Pieces of documents as segments of at most `SEGMENT_CHARS` characters.

    A long document is cut where a word or a line ends, before the white space:
    GPT-2's rule for splitting text into words puts a border there anyway, so
    the tokens are those of the uncut document. Documents without text vanish.

    Args:
      pieces: (text, ends) as `documents` yields them.
      key: of every document; without it, 64 bits of the text's sha256.
    """
    held, digest, empty = "", hashlib.sha256(), True
    for text, ends in pieces:
        digest.update(text.encode())
        empty = empty and not text
        held += text
        start = 0
        while len(held) - start > SEGMENT_CHARS:
            cut = _cut(held, start)
            yield Segment(held[start:cut], False, 0)
            start = cut
        held = held[start:]
        if ends:
            if not empty:
                yield Segment(held, True, key_of(digest.digest()) if key is None else key)
            held, digest, empty = "", hashlib.sha256(), True


def key_of(sha256: bytes) -> int:
    """The first 64 bits of a digest."""
    return int.from_bytes(sha256[:8], "big")


def _cut(text: str, start: int) -> int:
    """Where to end the segment that begins at `start`: before a line end, else a space, else anywhere."""
    for space in "\n ":
        at = text.rfind(space, start + SEGMENT_CHARS // 2, start + SEGMENT_CHARS)
        while at > 0 and text[at - 1].isspace():
            at = text.rfind(space, start + SEGMENT_CHARS // 2, at)
        if at > 0:
            return at
    return start + SEGMENT_CHARS
