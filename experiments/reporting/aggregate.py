"""Results rows as lines of tables: which rows make a line, their statistics, and Markdown.

A line is one config: rows that differ in more than the seed and what changes no figure (`NO_MATTER`) are
refused, never averaged. Spreads are sample standard deviations over seeds.
"""

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from experiments.reporting.render import Table
from tree_ffn.errors import InputError
from tree_ffn.training.plan import differing_keys
from tree_ffn.upgrades import upgraded

# In the order of tables. Hash trees and continuous ones are of rows of commit 30983ff or before.
KINDS = (
    "dense", "narrow", "moe", "hash", "random_experts", "random_tree", "hash_tree", "tree_hard",
    "tree_straight", "tree_continuous", "tree", "leaf",
)  # fmt: skip
# A leaf layer's kind, by its router; of other routers `leaf`.
LEAF_KINDS = {"tree": "leaf", "softmax": "moe", "hash": "hash", "random": "random_experts"}

# Keys that may differ within a line.
NO_MATTER = (
    r"(seed|scored.*|mesh\..*|model\.(remat|unroll)|ffn\.implementation|data\.tokenizer"
    r"|train\.(log_every|eval_every|checkpoint_every|checkpoint_minutes|grad_sync|probe|keep|keep_every"
    r"|max_hours|profile_at|wandb|compile_cache))$"
)
# Keys that may differ between the lines of a table too: the layer, how it was made, and what is tuned for it.
OWN = (
    r"((ffn|convert|finetune|prune)\..*|model\.(layers|ffns|init\.w_out)"
    r"|optim\.(lr|b2|weight_decay|routers_until))$"
)
# All other keys may not.
COMMON = rf"(?!{NO_MATTER})(?!{OWN})"

# Cards of one chip with other memories: what a run learns on them is the same, how long it takes is not.
ALIKE = {"h100": "Hopper GPU", "h200": "Hopper GPU"}


def groups(rows: Iterable[dict], key: Callable) -> dict:
    """{key(row): rows}, by ascending key; rows keep their order."""
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def lines_of(rows: list[dict], free: str = NO_MATTER, common: str = COMMON) -> dict[str, list[dict]]:
    """{row name: its rows}, dense first and trees last; refuses what cannot be compared.

    Args:
      rows: of one table.
      free: regex of the keys of a config that may differ within a line.
      common: regex of the keys that must agree in the whole table.

    Raises:
      InputError: names the line, the key and two of its values.
    """
    lines = groups(rows, lambda row: row["row"])
    for name, line in lines.items():
        check_same(name, line, rf"(?!{free})")
    if "mixed" not in rows[0]:
        check_same("its lines", rows, common)
    return dict(sorted(lines.items(), key=lambda item: (rank(item[1][0]), item[0])))


def mixed(rows: list[dict]) -> list[dict]:
    """Rows of one table that may differ in text, steps or size: what differs stands in their names.

    So such lines are side by side but never in one line, and no gap is computed between them.
    """
    found = differences([row["config"] for row in rows])
    if not found:
        return rows
    label = lambda row: "".join(f"@{str(setting(row, key))[:8]}" for key in sorted(found))
    return [{**row, "row": row["row"] + label(row), "mixed": sorted(found)} for row in rows]


def kind_of_layer(row: dict) -> str:
    """The kind of layer that a row's config says it has, whatever the row is called; "" where it says none.

    Example:
      >>> kind_of_layer({"config": {"ffn": {"kind": "tree", "routing": "straight_through"}}})
      'tree_straight'
      >>> kind_of_layer({"config": {"model": {"layers": "dense,narrow"}, "ffn": {"kind": "dense"}}})
      'dense,narrow'
    """
    if "convert" in row["config"]:
        return "converted"
    if layers := setting(row, "model.layers"):
        return layers
    if ffns := setting(row, "model.ffns"):
        return ",".join(sorted({ffn["kind"] for ffn in ffns}))
    kind = setting(row, "ffn.kind") or ""
    if kind == "leaf":
        return LEAF_KINDS.get(str(setting(row, "ffn.router")), "leaf")
    return f"tree_{str(setting(row, 'ffn.routing')).partition('_')[0]}" if kind == "tree" else kind


def rank(row: dict) -> int:
    """Place of a row's kind of layer in a table; rows that say none stand last."""
    kind = kind_of_layer(row)
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def differences(configs: list[dict], binding: str = COMMON) -> dict[str, tuple]:
    """{key: two of its values} of the binding keys in which configs differ from the first.

    Args:
      configs: resolved; `data` says what the data are.
      binding: regex of the keys that have to agree.

    Example:
      >>> differences([{"train": {"steps": 9}, "seed": 0}, {"train": {"steps": 12}, "seed": 1}])
      {'train.steps': (9, 12)}
    """
    found: dict[str, tuple] = {}
    for config in {id(config): config for config in configs[1:]}.values():  # rows of one run share one
        for key, values in telling_differences(configs[0], config).items():
            if re.match(binding, key):
                found.setdefault(key, values)
    return found


def telling_differences(one: dict, other: dict) -> dict[str, tuple]:
    """{key: values} in which two recorded configs differ, each read as one of its `config_version`."""
    return differing_keys(upgraded(one), upgraded(other))


def check_same(name: str, rows: list[dict], binding: str = rf"(?!{NO_MATTER})") -> None:
    """Raises InputError where configs of rows differ in a binding key; by default in one that matters.

    Args:
      name: of the table's line, for the error.
      rows: of the line.
      binding: pattern of the config's keys that have to be equal.
    """
    for key, (one, other) in differences([row["config"] for row in rows], binding).items():
        raise InputError(
            f"results: table {rows[0]['table']}, {name}: {key} is both {one!r} and {other!r}; "
            "only rows of one text, one number of steps and one config can be compared."
        )


def setting(row: dict, key: str):
    """A value of the row's config by its dotted key; None where it is absent."""
    value = row["config"]
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if isinstance(value, dict) else value


def machine(row: dict) -> str:
    """The row's device, or the name of those like it (`ALIKE`).

    Example:
      >>> machine({"device": "h200"}), machine({"device": "cpu"})
      ('Hopper GPU', 'cpu')
    """
    device: str = row["device"]
    return ALIKE.get(device, device)


def trained(row: dict) -> tuple:
    """Runs of one length on devices that are alike."""
    return machine(row), setting(row, "train.steps") or 0


def clocked(row: dict) -> tuple:
    """Runs of one length on one device: what `trained` calls alike takes other times."""
    return row["device"], setting(row, "train.steps") or 0


def learning_rate(line: list[dict]) -> str:
    rate = setting(line[0], "optim.lr")
    return "" if rate is None else f"{rate:g}"


def last_of(lines: dict[str, list[dict]]) -> dict:
    """A row of the last line."""
    return list(lines.values())[-1][-1]


def by_seed(line: list[dict], metric: str) -> dict:
    """{seed: value} of a metric; a later row supersedes."""
    return {row["seed"]: row["value"] for row in line if row["metric"] == metric}


def baseline(lines: dict[str, list[dict]], kind: str) -> list[dict]:
    """Rows of the only line that is of a kind and called so; empty if there is none, or more than one."""
    found = [line for line in lines.values() if kind_of_layer(line[0]) == kind and is_called_so(line[0])]
    return found[0] if len(found) == 1 else []


def is_called_so(row: dict) -> bool:
    """Whether a row's name begins with its kind, as `narrow_A96` does and `plain_A336` does not."""
    return re.match(rf"{kind_of_layer(row)}(_|$)", row["row"]) is not None


def paired(formula: Callable, *by_seeds: dict) -> list[float]:
    """`formula` of the values of each seed that all have.

    Example:
      >>> paired(lambda a, b: a - b, {0: 3.0, 1: 4.0}, {1: 2.5, 2: 9.0})
      [1.5]
    """
    seeds = [seed for seed in by_seeds[0] if all(seed in values for values in by_seeds)]
    return [formula(*(values[seed] for values in by_seeds)) for seed in seeds]


def gap_closed(lines: dict[str, list[dict]], line: list[dict], metric: str = "val_loss") -> list[float]:
    """(narrow - x) / (narrow - dense) of validation loss, or of another loss; a value a seed.

    Args:
      lines: {name: rows} of the table, baselines among them.
      line: rows of x.
      metric: the loss.
    """
    if any("mixed" in row for row in line):
        return []
    ends = baseline(lines, "narrow"), baseline(lines, "dense")
    x, narrow, dense = (by_seed(rows, metric) for rows in (line, *ends))
    dense = {seed: value for seed, value in dense.items() if narrow.get(seed) != value}  # no gap, no share
    return paired(lambda x, n, d: (n - x) / (n - d), x, narrow, dense)


def middle(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; of one value the latter is 0.

    Example:
      >>> middle([1.0, 3.0])[0], middle([2.0])
      (2.0, (2.0, 0.0))
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Iterable[float], form: str = ".4f") -> str:
    """Mean and standard deviation; a single value says so.

    Example:
      >>> spread([1.0, 3.0], ".1f"), spread([1.0], ".1f"), spread([])
      ('2.0 ± 1.4', '1.0 (one seed)', '')
    """
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:{form}} (one seed)" if values else ""
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}"


def mean(line: list[dict], metric: str, form: str) -> str:
    """Mean over seeds; empty where the metric is absent.

    Args:
      line: rows of all seeds.
      metric: of which.
      form: format of the number.
    """
    values = by_seed(line, metric).values()
    return f"{statistics.fmean(values):{form}}" if values else ""


def block(
    title: str, text: str, head: list[str], cells: list[list[str]], last: dict, labels: int = 1,
    lines: dict[Any, list[dict]] | None = None,
) -> Table:  # fmt: skip
    """A table to print.

    Args:
      title, text: of the table.
      head: headings of the columns; the first `labels` of them stand left.
      cells: one list a line.
      last: a row of the last line, whose command stands below.
      labels: columns of text.
      lines: rows of each line; their last commands go with a table in LaTeX.
    """
    rows = [line[-1] for line in lines.values()] if lines else [last]
    return Table(title, text, head, cells, labels, tuple(row["command"] for row in rows))


def origin(rows: list[dict]) -> str:
    """Where rows come from: devices, version of jax, commits, seeds."""
    unique = lambda values: ", ".join(map(str, sorted(set(values))))
    cores = unique(row["config"]["cores"] for row in rows if "cores" in row["config"])
    seeds = unique(row["seed"] for row in rows if row["seed"] is not None)
    device = f"Device `{unique(row['device'] for row in rows)}`" + (f" ({cores} CPU cores)" if cores else "")
    jax = f"jax {unique(row['versions'].get('jax', 'unknown') for row in rows)}"
    shown = lambda commit: commit[:12] if len(commit) == 40 else commit  # a whole hash, as git abbreviates it
    commit = f"commit {unique(shown(row['commit']) for row in rows)}"
    said = ", ".join([device, jax, commit] + ([f"seeds {seeds}"] if seeds else ["no seeds (timings)"])) + "."
    mix = ", ".join(rows[0].get("mixed", ()))
    return f"{said} {not_comparable('its lines', mix)}" if mix else said


def not_comparable(what: str, keys: str) -> str:
    """What stands beside things that are shown together though they cannot be compared."""
    return f"MIXED: {what} differ in {keys} and cannot be compared."


def task(rows: list[dict]) -> str:
    """Which model, on which text, for how long."""
    get = lambda key: setting(rows[-1], key)
    model = get("model.preset") or f"{get('model.n_layers')} layers of width {get('model.width')}"
    python = f" of Python {get('data.python')}" if get("data.python") else ""
    return (
        f"{model}, context {get('model.max_seq_len')}, {get('train.steps')} steps of "
        f"{get('train.batch_size')} sequences, corpus {get('data.corpus')}{python} "
        f"(sha256 {str(get('data.sha256'))[:12]})"
    )
