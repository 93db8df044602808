"""Makes tables from results/*.jsonl: the only source of claims.

    python -m experiments.tables              # prints the tables
    python -m experiments.tables --write      # writes the pages of docs/results, and their picture
    python -m experiments.tables --check      # exits 1 if those are not what results/ gives
    python -m experiments.tables --latex --results=results/t1_small.jsonl      # booktabs, with the commands

Files called *_tuning.jsonl hold the runs that learning rates were chosen by; they make the grids and
nothing else. What may stand in one line is said in experiments/reporting/aggregate.py.
"""

import pathlib
import sys

from absl import flags

from experiments.common import cli, path_flags
from experiments.reporting import granularity
from experiments.reporting.drawing import alone, check_installed
from experiments.reporting.pages import pages_of
from experiments.reporting.registry import by_topic, read_rows, tables_of
from tree_ffn.errors import InputError

_RESULTS = path_flags.define("results", "results/*.jsonl", "Results files (a glob pattern).")
_PAGES = path_flags.define("pages", "docs/results", "Directory of the pages.")
_WRITE = flags.DEFINE_bool("write", False, "Write the pages in --pages.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1 if a page in --pages is out of date.")
_LATEX = flags.DEFINE_bool("latex", False, "Print LaTeX (package booktabs) in place of Markdown.")
_MIXED = flags.DEFINE_bool("mixed", False, "Let lines of other data or steps into one table, which says so.")


def main() -> None:
    if (_LATEX.value or _MIXED.value) and (_WRITE.value or _CHECK.value):
        raise InputError(
            "--latex and --mixed are not allowed with --write or --check; leave one of them out."
        )
    measured, tuning = read_rows(_RESULTS.value)
    if _WRITE.value or _CHECK.value:
        pages = pages_of(by_topic(measured, tuning))
        old = outdated(_PAGES.value, pages)
        if _CHECK.value and old:
            late = ", ".join(old)
            print(f"{late}: out of date; run python -m experiments.tables --write.", file=sys.stderr)
            sys.exit(1)
        write(_PAGES.value, {name: pages[name] for name in old} | pictures(measured))
        return
    tables = tables_of(measured, tuning, _MIXED.value)
    body = "\n\n".join(table.latex() if _LATEX.value else table.markdown() for table in tables)
    print(body or f"No rows in {_RESULTS.value}.")


def pictures(measured: list[dict]) -> dict[str, str]:
    """{file name: SVG} of the pictures of pages. --check leaves them out: versions of matplotlib differ."""
    timings = [row for row in measured if row["table"] == "granularity"]
    if not timings:
        return {}
    check_installed("tables --write")
    return {"granularity.svg": alone(granularity.picture(timings, measured))}


def outdated(directory: str, pages: dict[str, str]) -> list[str]:
    """Names of the pages that are missing in a directory or read otherwise."""
    files = {name: pathlib.Path(directory, name) for name in pages}
    return [
        name
        for name, file in files.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != pages[name]
    ]


def write(directory: str, pages: dict[str, str]) -> None:
    """Writes pages; a directory that does not take them is an InputError."""
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            pathlib.Path(directory, name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--pages: {directory} cannot be written ({error.strerror}).") from error


def render(pattern: str) -> str:
    """All tables that results files have rows for, as Markdown; empty if there are none."""
    return "\n\n".join(table.markdown() for table in tables_of(*read_rows(pattern)))


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _WRITE.value)
