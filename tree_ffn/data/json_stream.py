"""JSON values one behind another, as JSON lines have them, or in one array; read as they come."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tree_ffn.errors import InputError
from tree_ffn.json_input import parse_json

# The longest value that is read; it is in memory twice, as JSON and as a value.
MOST_CHARS = 1 << 26
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# An error this near to the end of what has been read may be only that a literal or an escape goes on.
_LITERAL_CHARS = len("-Infinity")
_DECODER = json.JSONDecoder()


def json_values(texts: Iterable[str], where: str) -> Iterator[tuple[int, Any]]:
    """The values of a text: of lines, of arrays, or each over several lines.

    Numbers that are not finite, which Python writes, are read.

    Args:
      texts: the text in parts.
      where: what errors begin with: the file.

    Yields:
      (line, value): the line on which the value begins, from 1.

    Raises:
      InputError: it is not JSON, or a value is too long; names the line.

    Example:
      >>> list(json_values(['{"a": 1}\\n{"a"', ': 2}']
      ...  , "x.jsonl")), list(json_values(['["b",\\n"c"]'], "x.json"))
      ([(1, {'a': 1}), (2, {'a': 2})], [(1, 'b'), (2, 'c')])
    """
    reader = _Reader(texts, where)
    while beginning := reader.peek():
        if beginning == "[":
            yield from _elements(reader)
        else:
            yield reader.line, reader.value()


def _elements(reader: "_Reader") -> Iterator[tuple[int, Any]]:
    """The elements of the array that begins."""
    reader.step()
    if reader.peek() == "]":
        return reader.step()
    while True:
        reader.peek()
        yield reader.line, reader.value()
        mark = reader.peek()
        if mark not in (",", "]"):
            raise InputError(
                f"{reader.place} is not JSON that can be read: a comma or the array's end is missing."
            )
        reader.step()
        if mark == "]":
            return None


class _Reader:
    """A text in parts, and a place in it."""

    def __init__(self, texts: Iterable[str], where: str):
        self._texts, self._where = iter(texts), where
        self._held, self._at, self.line = "", 0, 1

    @property
    def place(self) -> str:
        return f"{self._where}, line {self.line}"

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            self._pass_to(_SPACE.match(self._held, self._at).end())  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def step(self) -> None:
        """Passes one character."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                if not (self._may_go_on(error) and self._more()):
                    parse_json(self._held[self._at :], self.place, finite=False)  # raises, and says why
                    raise
                continue
            self._pass_to(end)
            return value

    def _may_go_on(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError):
            return False
        if len(self._held) - self._at > MOST_CHARS:
            raise InputError(f"{self.place} has a value of more than {MOST_CHARS >> 20} Mi characters.")
        return error.msg.startswith("Unterminated") or error.pos + _LITERAL_CHARS > len(self._held)

    def _more(self) -> bool:
        """Reads as much again as is held, so that a long value is tried a few times; False at the end."""
        parts, n, least = [self._held[self._at :]], 0, len(self._held) - self._at
        for text in self._texts:
            parts.append(text)
            n += len(text)
            if n > least:
                break
        self._held, self._at = "".join(parts), 0
        return n > 0

    def _pass_to(self, end: int) -> None:
        self.line += self._held.count("\n", self._at, end)
        self._at = end
