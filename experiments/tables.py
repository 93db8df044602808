"""Makes the tables of README.md from results/*.jsonl: the only source of claims.

    python -m experiments.tables              # prints the tables
    python -m experiments.tables --readme     # rewrites the section of results in README.md
    python -m experiments.tables --check      # exits 1 if that is not what results/ gives
    python -m experiments.tables --latex --results=results/t1_small.jsonl      # booktabs, with the commands

Files called *_tuning.jsonl hold the runs that learning rates were chosen by; they make the grids and
nothing else. What may stand in one line is said in experiments/lines.py.
"""

import re
import sys

from absl import flags

from experiments import cli, path_flags
from experiments.all_tables import read_rows, tables_of
from tree_ffn.errors import InputError

_RESULTS = path_flags.define("results", "results/*.jsonl", "Results files (a glob pattern).")
_PAGE = path_flags.define("page", "README.md", "File with the section of results.")
_README = flags.DEFINE_bool("readme", False, "Rewrite the section of results in --page.")
_LATEX = flags.DEFINE_bool("latex", False, "Print LaTeX (package booktabs) in place of Markdown.")
_MIXED = flags.DEFINE_bool("mixed", False, "Let lines of other data or steps into one table, which says so.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1 if the section in --page is out of date.")

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def main() -> None:
    if (_LATEX.value or _MIXED.value) and (_README.value or _CHECK.value):
        raise InputError(
            "--latex and --mixed are not allowed with --readme or --check; leave one of them out."
        )
    measured, tuning = read_rows(_RESULTS.value)
    tables = tables_of(measured, tuning, _MIXED.value)
    body = "\n\n".join(table.latex() if _LATEX.value else table.markdown() for table in tables)
    if not (_README.value or _CHECK.value):
        print(body or f"No rows in {_RESULTS.value}.")
        return
    page = _PAGE.value
    old = read(page)
    new = with_section(old, body, page)
    if _CHECK.value and new != old:
        print(f"{page}: out of date; run python -m experiments.tables --readme.", file=sys.stderr)
        sys.exit(1)
    if new != old:
        write(page, new)


def read(page: str) -> str:
    """The page's text; one that cannot be read is an InputError."""
    try:
        with open(page, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"--page: {page} cannot be read ({error.strerror}).") from error


def write(page: str, text: str) -> None:
    """Writes the page; one that cannot be written is an InputError."""
    try:
        with open(page, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"--page: {page} cannot be written ({error.strerror}).") from error


def render(pattern: str) -> str:
    """All tables that results files have rows for, as Markdown; empty if there are none."""
    return "\n\n".join(table.markdown() for table in tables_of(*read_rows(pattern)))


def with_section(text: str, body: str, page: str) -> str:
    """`text` with `body` between its two marks."""
    match = re.fullmatch(f"(.*{BEGIN}\n)(.*)({END}.*)", text, re.S)
    if not match or text.count(BEGIN) + text.count(END) != 2:
        raise InputError(f"--page: {page} is not allowed; it needs {BEGIN} and after it {END}, once each.")
    return match[1] + (f"\n{body}\n\n" if body else "") + match[3]


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _README.value)
