"""A page to look at: loss curves, how the trees are used over time, and tables with Pareto plots.

    python -m experiments.report --workdir=runs/tree --to=report.html
    python -m experiments.report --workdir='runs/t4/*' --results=results/t4_small.jsonl --to=t4.html

One file without scripts and without anything from the network; it reads in light, dark and print. Of one run
it shows everything, of several runs their losses together and everything of the first --details of them.
Runs of different text, length or size are refused as rows of a table are; --mixed shows them all the same.
"""

import html
import os

from absl import flags

from experiments.common import cli, path_flags
from experiments.reporting import html_page
from experiments.reporting.aggregate import groups, mixed, not_comparable
from experiments.reporting.drawing import check_installed
from experiments.reporting.html_page import rich, table_html
from experiments.reporting.registry import read_rows, tables_in, tables_of
from experiments.reporting.render import Table
from experiments.reporting.report_figures import (
    CAPTIONS,
    Run,
    load_run,
    pareto_figures,
    run_commands,
    run_differences,
    run_facts,
    run_figures,
    usage_metrics,
)
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.paths import expanded

_WORKDIR = path_flags.define_list("workdir", [], "Directories of runs (glob patterns, comma separated).")
_RESULTS = path_flags.define("results", None, "Results files (a glob pattern): tables, Pareto plots.")
_TO = path_flags.define_written(
    "to", None, "The page to write, e.g. report.html; an older report is replaced."
)
_TITLE = flags.DEFINE_string("title", "", "Title of the page; by default the names of what it shows.")
_DETAILS = flags.DEFINE_integer("details", 1, "Of so many runs the use of trees is shown.")
_MIXED = flags.DEFINE_bool(
    "mixed", False, "Let runs and rows of different text, length or size stand together; the page says so."
)

# Tables of models made from others: the configs of their rows say what they were made from.
DERIVED = ("prune_small", "conversion", "oracle")


def main() -> None:
    if not _WORKDIR.value and not _RESULTS.value:
        raise InputError("--workdir is missing; name runs, e.g. --workdir=runs/tree, or --results.")
    if not _TO.value:
        raise InputError("--to is missing; name the page to write, e.g. --to=report.html.")
    check_positive_int("--details", _DETAILS.value, least=0)
    html_page.check_target(_TO.value, "--to")
    check_installed("report")
    runs = [load_run(path) for path in directories(_WORKDIR.value)]
    if not _MIXED.value:
        check_comparable(runs)
    tables, rows = [], []
    if _RESULTS.value:
        rows, tuning = read_rows(_RESULTS.value)
        tables = tables_of(rows, tuning, _MIXED.value)
    names = [run.name for run in runs] + ([os.path.basename(_RESULTS.value)] if _RESULTS.value else [])
    title = _TITLE.value or ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    page = render(title, runs, rows, tables)
    html_page.write(_TO.value, page, "--to")
    size, figures = len(page.encode()) / 1e3, page.count("<figure")
    print(f"{_TO.value}: {size:,.0f} kB, {figures} figures, {len(tables)} tables")


def directories(patterns: list[str]) -> list[str]:
    """The directories of runs that patterns match, each once.

    Raises:
      InputError: a pattern matches no directory.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        paths = [path for path in expanded(pattern) if os.path.isdir(path)]
        if not paths:
            raise InputError(f"--workdir: {pattern!r} is no directory; name the workdir of a run.")
        # A pattern may meet directories of other things; what it meets alone must be a run.
        runs = [path for path in paths if os.path.exists(os.path.join(path, "metrics.jsonl"))]
        found |= dict.fromkeys(runs or paths)
    return list(found)


def check_comparable(runs: list[Run]) -> None:
    """Raises InputError for runs whose losses say nothing about each other."""
    for key, (one, other) in run_differences(runs).items():
        raise InputError(
            f"--workdir: {key} is both {one!r} and {other!r}; only runs of one text, one number of steps and "
            "one size can be compared; --mixed shows them together."
        )


def render(title: str, runs: list[Run], rows: list[dict], tables: list[Table]) -> str:
    """The whole page.

    Args:
      title: of the page.
      runs: as `load_run` gives them.
      rows: of results files, for the Pareto plots.
      tables: made of them.
    """
    parts = []
    if runs:
        parts += [grid(run_figures(runs)), *map(run_facts, runs)]
    for run in runs[: _DETAILS.value]:
        if figures := usage_metrics(run):
            parts += [f"<h2>How the trees of {html.escape(run.name)} are used</h2>", grid(figures)]
    for heading, mine in comparable(rows).items():
        mine = mixed(mine) if _MIXED.value else mine
        if figures := pareto_figures(mine):
            keys = ", ".join(mine[0].get("mixed", ()))
            said = f" {not_comparable('points', keys)}" if keys else ""
            parts += [f"<h2>{html.escape(heading)}</h2>", grid(figures), f"<p>{CAPTIONS['pareto']}{said}</p>"]
    parts += [table_html(table) for table in tables]
    parts += ["<h2>Commands</h2>", *map(run_commands, runs), *map(table_command, tables)]
    return html_page.page(title, parts)


def comparable(rows: list[dict]) -> dict[str, list[dict]]:
    """{heading: rows} of what one figure may hold: one table, device and length, with losses."""
    found = {}
    for table, (key, _) in tables_in(rows).items():
        mine = [row for row in rows if row["table"] == table]
        if any(row["metric"] == "val_loss" for row in mine) and table not in DERIVED:
            for (device, steps, *size), group in groups(mine, key).items():
                found[f"{' '.join([table, *size])} on {device}, {steps} steps"] = group
    return found


def grid(figures: list[str]) -> str:
    """Figures beside each other, as many as there is room for."""
    return f'<div class="figures">{"".join(figures)}</div>'


def table_command(table: Table) -> str:
    """What made the last line of a table."""
    return f"<p>{rich(table.title)}, last line:</p><pre>{html.escape(table.commands[-1])}</pre>"


if __name__ == "__main__":
    cli.run(main)
