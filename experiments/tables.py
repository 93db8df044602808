"""Makes the tables of README.md from results/*.jsonl: the only source of quality claims.

    python -m experiments.tables                 # prints them
    python -m experiments.tables --readme        # rewrites the section of results in README.md
    python -m experiments.tables --check         # exits 1 if that section is not what results/ gives
    python -m experiments.tables --latex --results=results/t1_small.jsonl      # booktabs, with the commands

Files called *_tuning.jsonl hold the runs that learning rates were chosen by; they make the grids and
nothing else. What may stand in one line is said in experiments/lines.py.
"""

import re
import sys

from absl import flags

from experiments import cli
from experiments.all_tables import make_tables
from tree_ffn.errors import InputError

_RESULTS = flags.DEFINE_string("results", "results/*.jsonl", "Results files (a glob pattern).")
_PAGE = flags.DEFINE_string("page", "README.md", "File with the section of results.")
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
    tables = make_tables(_RESULTS.value, _MIXED.value)
    body = "\n\n".join(table.latex() if _LATEX.value else table.markdown() for table in tables)
    if not (_README.value or _CHECK.value):
        print(body or f"No rows in {_RESULTS.value}.")
        return
    page = _PAGE.value
    try:
        with open(page, encoding="utf-8") as file:
            old = file.read()
        new = with_section(old, body, page)
        if _CHECK.value and new != old:
            print(f"{page} is out of date; run python -m experiments.tables --readme.", file=sys.stderr)
            sys.exit(1)
        if new != old:
            with open(page, "w", encoding="utf-8") as file:
                file.write(new)
    except OSError as error:
        raise InputError(f"--page: {page} cannot be read or written ({error.strerror}).") from error


def render(pattern: str) -> str:
    """All tables that results files have rows for, as Markdown; empty if there are none."""
    return "\n\n".join(table.markdown() for table in make_tables(pattern))


def with_section(text: str, body: str, page: str) -> str:
    """`text` with `body` between its two marks."""
    match = re.fullmatch(f"(.*{BEGIN}\n)(.*)({END}.*)", text, re.S)
    if not match or text.count(BEGIN) + text.count(END) != 2:
        raise InputError(f"--page: {page} is not allowed; it needs {BEGIN} and after it {END}, once each.")
    return match[1] + (f"\n{body}\n\n" if body else "") + match[3]


if __name__ == "__main__":
    cli.run(main)
