"""What a task file's templates ask of its data: fields that every row has to have.

The harness fills a template's unknown fields with nothing and goes on. Over the data of another task it would
give a score that looks valid.
"""

import collections
import re
from collections.abc import Iterable

from tree_ffn.errors import InputError

TEMPLATE = re.compile(r"^doc_to_(text|target|choice): *(.*?) *$", re.MULTILINE)
WORDS = frozenset("and or not in is if else true false none True False None range loop".split())


def check_templates(path: str, text: str) -> None:
    """Raises InputError unless braces are closed and a choice among answers says where they are.

    Args:
      path: of the task file, for messages.
      text: its content.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if TEMPLATE.match(line) and line.count("{{") != line.count("}}"):
            raise InputError(f"--tasks: {path}, line {number}: a {{{{ has no }}}}: {line.strip()!r}.")
    chosen = re.search(r"^output_type: *multiple_choice *$", text, re.MULTILINE)
    if chosen and not re.search(r"^doc_to_choice:", text, re.MULTILINE):
        line = text[: chosen.start()].count("\n") + 1
        raise InputError(f"--tasks: {path}, line {line}: multiple_choice needs the field 'doc_to_choice'.")


def asked_for(text: str) -> tuple[set[str], set[str]]:
    """Fields that a task's templates need, and words that are fields where the data have them.

    Args:
      text: of a task file.

    Example:
      >>> needed, perhaps = asked_for('doc_to_text: "Q: {{q.strip()}}"\\ndoc_to_choice: choices\\n')
      >>> sorted(needed), sorted(perhaps)
      (['choices', 'q'], [])
    """
    needed, perhaps = set(), set()
    for part, value in TEMPLATE.findall(text):
        if value.startswith("!function") or "{%" in value:
            continue
        if re.fullmatch(r"[A-Za-z_]\w*", value):
            (needed if part == "choice" else perhaps).add(value)
        for expression in re.findall(r"\{\{(.*?)\}\}", value):
            bare = re.sub(r"'[^']*'|\\?\"[^\"]*\"|\|\s*\w+|\.\s*\w+", " ", expression)
            needed |= set(re.findall(r"\b[A-Za-z_]\w*", bare)) - WORDS
    return needed, perhaps


def check_rows(rows: Iterable[tuple[str, dict]], task: str, text: str) -> None:
    """Raises InputError, which names file, line and field, unless all rows have what the templates need.

    What a field holds is of one kind in all rows: of another the harness makes text, such as "None".

    Args:
      rows: (place, row) of a data file; a place is for messages.
      task: name of the task.
      text: of its task file.
    """
    needed, perhaps = asked_for(text)
    rows = list(rows)
    needed |= perhaps.intersection(field for _, row in rows for field in row)  # what one has all must have
    for place, row in rows:
        for field in sorted(needed - row.keys()):
            raise InputError(f"{place}: no field {field!r}, which {task} needs.")
    for field in sorted(needed):
        kinds = [(place, _kind(row[field])) for place, row in rows]
        told = collections.Counter(kind for _, kind in kinds if kind not in ("null", "a list"))
        most = next(iter(told.most_common(1)), ("a value", 0))[0]
        for place, kind in kinds:
            # An empty list may be one of anything.
            if kind != most and not (kind == "a list" and most.startswith(kind)):
                raise InputError(
                    f"{place}: the field {field!r} is {kind}; {task} needs {most}, as elsewhere."
                )


def _kind(value) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        inner = sorted({_kind(one) for one in value})
        return f"a list of {' and '.join(inner)}" if inner else "a list"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")
