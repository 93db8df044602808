"""How measurements stand in a results file: a line a run, and every config once.

    {"id": "9f2c...", "config": {...}}
    {"config": "9f2c...", "table": ..., "row": ..., "seed": 0, "device": ..., "metrics": {"val_loss": 4.21},
     "seedless": {"tokens_per_s": 1e5}, "commit": ..., "command": ..., "versions": ..., "date": ...}

A config stands before the first run that has it. Its seed is written as null and is the run's, so that seeds
share a config; another text that was scored (`scored`) stands in the line too. Metrics that say nothing about
a seed are `seedless`. A unit is written (`units`) only where the metric's name does not say it. Lines are
appended, never edited; files may be joined.

    python -m experiments.reporting.results_file results/old.jsonl     # rewrites it in this form

Until 2026-11-30 every measurement was a line with a config of its own; such lines are read too.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tree_ffn.json_output import json_text

RUN = ("table", "row", "device", "commit", "command", "versions", "date")


def to_lines(rows: Iterable[dict], known: set[str], unit_of: Callable[[str], str | None]) -> list[str]:
    """Lines of a results file.

    Args:
      rows: a dict for every measurement, with the keys of `RUN`, `seed`, `metric`, `value`, `unit`, `config`.
      known: ids of the configs that the file has; those written now are added.
      unit_of: the unit of a metric by its name, if that says it.
    """
    lines: list[dict] = []
    latest: dict[str, dict] = {}
    for row in rows:
        config, seed, group = _told_apart(row)
        name = _digest(config)
        if name not in known:
            known.add(name)
            lines.append({"id": name, "config": config})
        run = {"config": name, "seed": seed, **{key: row[key] for key in RUN}}
        if "scored" in row["config"]:
            run["scored"] = row["config"]["scored"]
        line = latest.get(_digest(run))
        if line is None or row["metric"] in line.get(group, ()):  # measured again: the later line counts
            line = latest[_digest(run)] = dict(run)
            lines.append(line)
        line.setdefault(group, {})[row["metric"]] = row["value"]
        if row["unit"] != unit_of(row["metric"]):
            line.setdefault("units", {})[row["metric"]] = row["unit"]
    return [json_text(line, "results") for line in lines]


def from_lines(lines: Iterable[Any], unit_of: Callable[[str], str | None]) -> Iterator[list[dict]]:
    """The measurements of every line, as `to_lines` took them; none of a config's own line.

    Args:
      lines: values of JSON.
      unit_of: as of `to_lines`.

    Raises:
      KeyError: a line lacks a key, or names a config that does not stand before it.
      TypeError, AttributeError: it is of another form.
    """
    configs: dict[str, dict] = {}
    for line in lines:
        if "value" in line:  # of the older form
            yield [{key: value for key, value in line.items() if key != "config_hash"}]
            continue
        if "id" in line:
            configs[line["id"]] = line["config"]
            yield []
            continue
        run, config, units = {key: line[key] for key in RUN}, configs[line["config"]], line.get("units", {})
        if "seed" in config and config["seed"] is None:
            config = {**config, "seed": line["seed"]}
        if "scored" in line:
            config = {**config, "scored": line["scored"]}
        yield [
            {
                **run, "seed": seed, "metric": metric, "value": value,
                "unit": units.get(metric) or unit_of(metric), "config": config,
            }
            for group, seed in (("metrics", line["seed"]), ("seedless", None))
            for metric, value in line.get(group, {}).items()
        ]  # fmt: skip


def _told_apart(row: dict) -> tuple[dict, int | None, str]:
    """A row's config as it is written, the seed of its line, and where its metric stands."""
    config = {name: value for name, value in row["config"].items() if name != "scored"}
    seed = row["seed"]
    own = config.get("seed")
    if own is None or seed not in (None, own):
        return config, seed, "metrics"
    return {**config, "seed": None}, own, "seedless" if seed is None else "metrics"


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def rewrite(path: str) -> None:
    """A results file in today's form; it is replaced as a whole."""
    from experiments.reporting.record import unit_of  # which reads and writes by this module

    with open(path, encoding="utf-8") as file:
        rows = [row for found in from_lines(map(json.loads, file), unit_of) for row in found]
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in to_lines(rows, set(), unit_of))
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(name)
