"""JSON that somebody else wrote: a value, values one behind another as they come, or one sentence."""

import codecs
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tree_ffn.errors import InputError, check_not_pointer

# The longest first: UTF-32's mark of little-endian text begins as UTF-16's does.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# The longest value that is read; it is in memory twice, as JSON and as a value.
MOST_CHARS = 1 << 26
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# An error this near to the end of what has been read may be only that a literal or an escape goes on.
_LITERAL_CHARS = len("-Infinity")
_DECODER = json.JSONDecoder()


def parse_json(
    text: str | bytes, where: str, *, finite: bool = True, pairs: Callable[[list], Any] | None = None
) -> Any:
    """The value of a JSON text.

    Args:
      text: of the value; as bytes it is UTF-8, and a byte order mark at its beginning is no part of it.
      where: what errors begin with, e.g. "data.files: a.jsonl, line 3".
      finite: whether NaN and Infinity, which Python writes and JSON does not know, and numbers too large for
        a float are refused.
      pairs: makes a value of the (name, value) pairs of an object; it may raise ValueError with the reason.

    Raises:
      InputError: it is not JSON, is nested too deeply, or has a number that Python cannot read.

    Example:
      >>> parse_json(b'{"a": [1]}', "x.json")
      {'a': [1]}
      >>> parse_json("[" * 100_000, "x.json")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: x.json is not JSON that can be read: it is nested too deeply.
    """
    try:
        text = _decoded(text) if isinstance(text, bytes) else text
        return _decoder(finite, pairs).decode(text.removeprefix("\ufeff"))
    except RecursionError:
        why = "it is nested too deeply"
    except json.JSONDecodeError as error:
        check_not_pointer(where, error.doc[:40].encode(errors="replace"))
        what = error.msg.removesuffix(" at")
        why = f"{what[:1].lower()}{what[1:]} at character {error.pos + 1}"
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
    except ValueError as error:
        why = "it has a number of too many digits" if "integer string" in str(error) else str(error)
    raise InputError(f"{where} is not JSON that can be read: {why}.")


def parse_object(text: str | bytes, where: str, **options) -> dict[str, Any]:
    """The object of a JSON text; `options` as `parse_json` takes them.

    Raises:
      InputError: it is not JSON, or another value.

    Example:
      >>> parse_object("[1]", "x.json")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: x.json is no JSON object.
    """
    value = parse_json(text, where, **options)
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object.")
    return value


def check_characters(text: str, where: str) -> None:
    """Raises InputError where a text holds half of a surrogate pair, which JSON can write and UTF-8 cannot.

    Example:
      >>> check_characters("a \\ud83d", "x.jsonl")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: x.jsonl holds \\ud83d, half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise InputError(f"{where} holds {half}, half of a surrogate pair, which is no character.") from None


def other_encoding(beginning: bytes) -> str | None:
    """The name of the encoding whose byte order mark a file begins with, if that is not UTF-8.

    Example:
      >>> other_encoding("text".encode("utf-16")), other_encoding(b"text")
      ('UTF-16', None)
    """
    return next((name for mark, name in _OTHER_MARKS.items() if beginning.startswith(mark)), None)


def _decoded(content: bytes) -> str:
    if encoding := other_encoding(content):
        raise ValueError(f"it is {encoding}, not UTF-8")
    return content.decode("utf-8")


def _no_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("it has a number that is too large")
    return value


@functools.cache
def _decoder(finite: bool, pairs: Callable[[list], Any] | None) -> json.JSONDecoder:
    rules: dict[str, Any] = {"parse_float": _finite_float, "parse_constant": _no_constant} if finite else {}
    return json.JSONDecoder(object_pairs_hook=pairs, **rules)


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
