"""All tables: which there are, what makes one of its own, on which page it stands, how rows become it."""

import glob
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

from experiments.reporting import granularity, record
from experiments.reporting.aggregate import (
    NO_MATTER,
    baseline,
    block,
    by_seed,
    clocked,
    differences,
    groups,
    is_called_so,
    kind_of_layer,
    last_of,
    learning_rate,
    lines_of,
    machine,
    mean,
    mixed,
    origin,
    paired,
    setting,
    spread,
    task,
    trained,
)  # fmt: skip
from experiments.reporting.conversion_table import conversion, kind_of
from experiments.reporting.faults_table import faults
from experiments.reporting.layer_tpu_table import compiled_for, layer_tpu
from experiments.reporting.oracle_table import oracle
from experiments.reporting.plan_table import plan, planned
from experiments.reporting.prune_table import prune_small
from experiments.reporting.quality_tables import (
    BITS,
    asked,
    cpu_small,
    other_texts,
    own,
    products,
    quality_attempts,
    quality_longer,
    quality_transfer,
    sized_text,
    t1_small,
    t3_small,
    t4_small,
)
from experiments.reporting.render import Table
from experiments.reporting.speed_tables import (
    answer_speed,
    decoded,
    scored_on,
    scoring_speed,
    speed_decode,
    speed_layer,
    speed_peers,
    speed_route,
    speed_steps,
    speed_train,
    stepped,
    timed,
    trained_on,
)
from tree_ffn.errors import InputError
from tree_ffn.paths import expanded


class Topic(NamedTuple):
    """A page: its title, what its tables answer, and what to know of its picture, if it has one."""

    title: str
    text: str
    picture: str = ""


def read_rows(pattern: str) -> tuple[list[dict], list[dict]]:
    """(measured, tuning): rows of results files; *_tuning.jsonl hold the runs that chose learning rates.

    Args:
      pattern: glob of results files; of rows of one measurement that of the later date counts.

    Raises:
      InputError: a file has no rows, or a line of it is no row.
    """
    paths = expanded(pattern) or ([] if glob.has_magic(pattern) else [pattern])
    check_not_empty(paths)
    tuning_paths = [path for path in paths if path.endswith("_tuning.jsonl")]
    measured = record.load_results([path for path in paths if path not in tuning_paths])
    return measured, record.load_results(tuning_paths)


def tables_of(measured: list[dict], tuning: list[dict], mix: bool = False) -> list[Table]:
    """All tables of rows.

    Args:
      measured: rows of runs and timings.
      tuning: rows that learning rates were chosen by: they make the grids and nothing else.
      mix: let rows that differ in text, steps or size stand in one table, which then says so.

    Raises:
      InputError: the rows of a table do not belong together.
    """
    return [table for _, table in by_topic(measured, tuning, mix)]


def by_topic(measured: list[dict], tuning: list[dict], mix: bool = False) -> list[tuple[str, Table]]:
    """As `tables_of`, each with its topic: the page of docs/results on which it stands.

    Args:
      measured: rows of results.
      tuning: rows of searches for learning rates.
      mix: put rows of several commits or devices into one table.
    """
    parts = []
    for name, (key, make) in tables_in(measured + tuning).items():
        found = [row for row in measured if row["table"] == name]
        if mix and key in MIXABLE:
            mine = {at: mixed(rows) for at, rows in groups(found, MIXABLE[key]).items()}
        else:
            mine = groups(found, key)
        if name in LENDERS:
            mine = {at: rows + LENDERS[name](rows, measured) for at, rows in mine.items()}
        grids = groups((row for row in tuning if (row["table"], row["metric"]) == (name, BITS)), trained)
        for rows in mine.values():
            table = make(rows)
            parts.append((topic(name, rows), table))
            if name in SCORED_ELSEWHERE and (below := other_texts(rows, table.title)):
                parts.append((name, below))
        parts += [("learning_rates", tuning_grid(rows)) for rows in grids.values()]
    if timings := [row for row in measured if row["table"] == "granularity"]:
        parts += [("granularity", table) for table in granularity.quality_by_width(timings, measured)]
    return parts


def tables_in(rows: list[dict]) -> dict[str, tuple[Callable, Callable]]:
    """`TABLES`, and for every other name that rows have a table of losses, as a user's own."""
    names = {row["table"] for row in rows} - TABLES.keys() - WITHOUT_A_TABLE
    return TABLES | dict.fromkeys(sorted(names), (trained, own))


def topic(name: str, rows: list[dict]) -> str:
    """A table's topic: its name, except that the speed of layers has two and that of programs one."""
    if name in ("speed_layer", "speed_route", "speed_peers"):
        return f"speed_layer_{'cpu' if rows[0]['device'] == 'cpu' else 'gpu'}"
    return "speed_programs" if name in SPEED_OF_PROGRAMS else name


def baselines(rows: list[dict], measured: list[dict]) -> list[dict]:
    """T1's rows, of the same task and device, for the baselines that attempts at its protocol have not."""
    own = {kind_of_layer(row) for row in rows if is_called_so(row)}
    return [
        row
        for row in measured
        if row["table"] == "t1_small"
        and kind_of_layer(row) in {"dense", "narrow", "moe"} - own
        and trained(row) == trained(rows[0])
        and not differences([rows[0]["config"], row["config"]])
    ]


def check_not_empty(paths: list[str]) -> None:
    """Raises InputError for an empty file; one that is not there says so when it is read."""
    for path in paths:
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise InputError(f"results: {path} holds no rows; remove it, or name another file.")


def quickstart(rows: list[dict]) -> Table:
    timings = {row["row"]: row["value"] for row in rows if row["metric"] == "time_ms"}
    runs = [row for row in rows if row["metric"] != "time_ms"] or rows
    lines = lines_of(runs)
    narrow = by_seed(baseline(lines, "narrow"), BITS)
    cells, verdict = [], ""
    for name, line in lines.items():
        bits = by_seed(line, BITS)
        margin = [] if kind_of_layer(line[0]) == "narrow" else paired(lambda n, x: n - x, narrow, bits)
        if margin:
            below = sum(value > 0 for value in margin)
            verdict += f" `{name}` ended below narrow in {below} of {len(margin)} seeds."
        cells.append([
            f"`{name}`", spread(bits.values()), spread(margin), products(line),
            mean(line, "tokens_per_s", ",.0f"), learning_rate(line), str(len(bits)),
        ])  # fmt: skip
    steps = ", ".join(f"`{name}` {value:.0f} ms" for name, value in timings.items())
    text = (
        f"What `make quickstart` trains: {task(runs)}. Held-out text; mean ± standard deviation over seeds. "
        "The margin is by how much a line ends below `narrow`, dense with as many active units, seed by "
        "seed. Products: dot products of the model's width that a token needs in a layer, routing counted."
        f"{verdict}{f' A training step: {steps}.' if steps else ''} {origin(rows)}"
    )
    head = ["", "bits per byte", "margin", "products", "tokens/s", "lr", "seeds"]
    return block("Quickstart", text, head, cells, last_of(lines), lines=lines)


def tuning_grid(rows: list[dict]) -> Table:
    """Bits per byte of each learning rate; the best of a line is bold, and marked at the edge of its grid."""
    lines = lines_of(rows, free=r"optim\.lr$|" + NO_MATTER)
    rates = sorted({setting(row, "optim.lr") for row in rows})
    cells = []
    for name, line in lines.items():
        tried = groups(line, lambda row: setting(row, "optim.lr"))
        means = {rate: statistics.fmean(by_seed(cell, BITS).values()) for rate, cell in tried.items()}
        best = min(means, key=lambda rate: means[rate])
        edge = " (edge)" if best in (min(means), max(means)) else ""
        shown = {rate: f"{value:.4f}" for rate, value in means.items()}
        shown[best] = f"**{shown[best]}**{edge}"
        cells.append([f"`{name}`", *(shown.get(rate, "") for rate in rates)])
    text = (
        f"What learning rates were chosen by: {task(rows)}. Bits per byte of held-out text, the best of a "
        f"line bold, `(edge)` where its grid ends there. {origin(rows)}"
    )
    title = f"Learning rates of {rows[0]['table']}, {setting(rows[0], 'train.steps')} steps"
    return block(title, text, ["", *(f"lr {rate:g}" for rate in rates)], cells, last_of(lines), lines=lines)


# Rows that docs/log.md reads and no page shows.
WITHOUT_A_TABLE = {"quality_curves"}
# Tables that stand on rows of others.
LENDERS = {"quality_attempts": baselines}
# Tables of programs' speed, which share a page.
SPEED_OF_PROGRAMS = ("speed_train", "speed_steps", "speed_decode", "scoring_speed", "answer_speed")
# Tables whose lines may have been scored on other texts too: those stand in a table below.
SCORED_ELSEWHERE = ("t1_small", "quality_attempts", "quality_longer", "quality_transfer")

# Of tables that may be mixed: what is a table of its own even so.
MIXABLE = {trained: machine, clocked: lambda row: row["device"]}

# name: (what makes a table of its own, how it is made).
TABLES = {
    "quickstart": (clocked, quickstart),
    "cpu_small": (trained, cpu_small),
    "t1_small": (trained, t1_small),
    "quality_attempts": (sized_text, quality_attempts),
    "quality_longer": (sized_text, quality_longer),
    "quality_transfer": (sized_text, quality_transfer),
    "oracle": (sized_text, oracle),
    "plan": (planned, plan),
    "t3_small": (asked, t3_small),
    "t4_small": (trained, t4_small),
    "prune_small": (trained, prune_small),
    "conversion": (kind_of, conversion),
    "speed_layer": (timed, speed_layer),
    "granularity": (timed, speed_layer),
    "speed_route": (scored_on, speed_route),
    "speed_peers": (scored_on, speed_peers),
    "layer_tpu": (compiled_for, layer_tpu),
    "speed_train": (trained_on, speed_train),
    "speed_steps": (stepped, speed_steps),
    "speed_decode": (decoded, speed_decode),
    "scoring_speed": (scored_on, scoring_speed),
    "answer_speed": (scored_on, answer_speed),
    "faults": (machine, faults),
}

# In the order of the index. Their names are those that `by_topic` gives to tables.
TOPICS = {
    "quickstart": Topic("Quickstart", "What `make quickstart` trains, on one machine."),
    "cpu_small": Topic("Small comparison", "All kinds of layers in a model that a CPU can train."),
    "t1_small": Topic("Language modelling (T1)", "All kinds of layers at one learning rate."),
    "quality_attempts": Topic("Attempts to close the gap", "Layers of T1's size, one line a design."),
    "quality_longer": Topic("Twice the training", "Layers of T1's size over 120 M tokens."),
    "quality_transfer": Topic("Other widths and texts", "The older recipe in other models than T1's."),
    "learning_rates": Topic("Learning rates", "The runs that learning rates were chosen by."),
    "oracle": Topic("Oracle routing", "How much lower the loss could be on better paths."),
    "plan": Topic("Plans", "Memory, bytes sent and days of large models, compiled but not run."),
    "t3_small": Topic("Questions (T3)", "Accuracies on the tasks of lm-eval's harness."),
    "t4_small": Topic("Dynamics (T4)", "How paths are used during training, by activation and balancing."),
    "prune_small": Topic("Pruning", "What trained layers lose when rarely visited parts are removed."),
    "conversion": Topic("Conversion", "Dense layers that become trees, before and after fine-tuning."),
    "speed_layer_cpu": Topic("Speed of layers on CPUs", "One layer alone, by number of tokens."),
    "speed_layer_gpu": Topic("Speed of layers on GPUs", "One layer alone, by number of tokens."),
    "granularity": Topic(
        "Granularity", "From a few large experts to many of one unit: cost and quality.", granularity.CAPTION
    ),
    "layer_tpu": Topic("Layers on TPUs", "One layer alone, compiled for chips that did not run it."),
    "speed_programs": Topic(
        "Speed of training, scoring and answers", "Whole models: training, training steps alone, questions."
    ),
    "faults": Topic("Faults", "What follows when something fails in a run or around it."),
}
