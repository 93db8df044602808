"""Prompts that a file holds: one a line, or a field of its rows."""

from pathlib import Path

from tree_ffn.data.formats import TEXT, kind_of, read_rows, read_text
from tree_ffn.errors import InputError
from tree_ffn.json_input import check_characters


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Raises:
      InputError: it cannot be read, or names the line that is no prompt.
    """
    where = f"--prompts: {path}"
    if kind_of(path, where) == TEXT:
        lines = read_text(path, where).removesuffix("\n").split("\n")
        found = [(f"{where}, line {i}", line.removesuffix("\r")) for i, line in enumerate(lines, start=1)]
    else:
        rows = read_rows(path, where)
        found = [(place, row.get("prompt") if isinstance(row, dict) else row) for place, row in rows]
    if not found or found[0][1] == "" and len(found) == 1:
        raise InputError(f"{where} has no lines; write one prompt a line.")
    return [_checked(prompt, place) for place, prompt in found]


def _checked(prompt: object, place: str) -> str:
    if not isinstance(prompt, str) or not prompt:
        raise InputError(f"{place} has no text; use a string of at least one character.")
    check_characters(prompt, place)
    return prompt
