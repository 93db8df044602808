"""The measured rows in results/*.jsonl that tables are made from.

How they stand there is said in `result_lines`. Of measurements with the same
(table, row, metric, seed, device, config_hash) that of the later date counts.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import re

from experiments.common.provenance import commit, device_name, public_command, versions
from experiments.reporting.results_file import from_lines, to_lines
from tree_ffn.errors import InputError, reason
from tree_ffn.paths import expanded
from tree_ffn.training.plan import resolved
from tree_ffn.upgrades import stamped, upgraded

FIELDS = (
    "table", "row", "metric", "value", "unit", "seed", "device", "config", "config_hash", "commit", "command",
    "versions", "date",
)  # fmt: skip
KEY = ("table", "row", "metric", "seed", "device", "config_hash")
DATA_FACTS = (
    "corpus", "sha256", "tokenizer", "tokenizer_sha256", "vocab_size", "row_tokens", "splits", "python",
)  # fmt: skip
MODEL_PATHS = ("start", "teacher")  # of `finetune`
UNITS = {
    "val_loss": "nats/token", "train_loss": "nats/token", "ppl": "1", "bits_per_byte": "bits/byte",
    "gap_closed": "1", "active_share": "1", "products": "products", "products_share": "1",
    "dead_leaves": "1", "leaf_entropy": "1",
    "constant_decisions": "1", "right_share": "1", "skew": "1", "changed": "1", "working_units": "units",
    "ever_working": "1", "gradient_right": "1", "nats_per_word": "nats/word", "word_ppl": "1",
    "tokens_per_s": "tokens/s", "seconds_per_step": "s", "time_ms": "ms",
    "kept": "1", "kept_experts": "1", "kept_oracle": "1", "kept_static": "1", "flops_share": "1",
    "loss_before": "nats/token", "loss_teacher": "nats/token", "tokens_until_near": "tokens",
    "oracle_loss": "nats/token", "moved": "1", "passes": "1", "skipped": "steps",
    "loss_rise": "nats/token", "units_kept": "units", "units_share": "1", "bytes": "bytes",
}  # fmt: skip
RENAMED = {"kept_paths": "kept_experts"}  # metrics of rows from before 2026-11-30
UNITS |= {old: UNITS[new] for old, new in RENAMED.items()}
OF_TEXTS = {
    "loss": "nats/token",
    **{name: UNITS[name] for name in ("ppl", "bits_per_byte", "nats_per_word", "word_ppl")},
}


def append_result(
    path: str, *, table: str, row: str, metric: str, value: float, seed: int | None, config: dict,
    unit: str | None = None, device: str | None = None, command: str | None = None,
) -> dict:  # fmt: skip
    """Appends one measurement to a results file and returns the row.

    Args:
      path: the JSONL file; made if it is not there.
      table, row, metric: names, e.g. "cpu_small", "tree_hard_P12_W1", "val_loss".
      value: a finite number.
      seed: of the run; None for timings.
      config: resolved config; data as name and sha256, never as a path (see `public_config`).
      unit: by default the unit of the metric in `UNITS`.
      device: by default that of this process (see `device_name`).
      command: by default this process's own (see `public_command`).

    Raises:
      InputError: a field is not allowed, or the file cannot be written.

    Example:
      >>> append_result("results/cpu.jsonl", table="cpu_small", row="dense", metric="val_loss",
      ...     value=1.25, seed=0, config={"model": {"width": 128}})          # doctest: +SKIP
    """
    result = make_row(table, row, metric, value, seed, config, unit, device, command)
    append_rows(path, [result])
    return result


def make_row(table, row, metric, value, seed, config, unit=None, device=None, command=None) -> dict:
    """A checked row.

    Args:
      table, row, metric, value, seed, config, unit, device, command: as `append_result` takes them.
    """
    result = {
        "table": table, "row": row, "metric": metric, "value": value,
        "unit": unit or UNITS.get(metric), "seed": seed, "device": device or device_name(),
        "config": stamped(resolved(config)), "config_hash": config_hash(config), "commit": commit(),
        "command": command or public_command(), "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    check_row(result)
    return result


def unit_of(metric: str) -> str | None:
    """The unit of a metric, by its name or by what follows the name of a text in it; None if neither says it.

    Example:
      >>> unit_of("ppl"), unit_of("novels_loss"), unit_of("novels_nats_per_word"), unit_of("other")
      ('1', 'nats/token', 'nats/word', None)
    """
    if metric in UNITS:
        return UNITS[metric]
    ends = ("_".join(metric.split("_")[first:]) for first in range(1, metric.count("_") + 1))
    return next((OF_TEXTS[end] for end in ends if end in OF_TEXTS), None)


def append_rows(path: str, results: list[dict]) -> None:
    """One write of whole lines; a torn line before them is closed first, never removed."""
    if not results:
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab+") as file:
            with contextlib.suppress(OSError):  # a file system without locks still appends
                fcntl.flock(file, fcntl.LOCK_EX)  # runs of a sweep write into one file
            file.seek(0)
            there = file.read()
            known = set(re.findall(r'^\{"id": "(\w+)"', there.decode(errors="replace"), re.M))
            lines = to_lines(results, known, unit_of)
            torn = there and not there.endswith(b"\n")
            file.write(("\n" * bool(torn) + "\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"results: {path} cannot be written ({error.strerror}).") from error


def check_row(result: dict) -> None:
    """Raises InputError unless `result` has every field of `FIELDS`, each of an allowed form."""
    missing = [field for field in FIELDS if field not in result]
    unknown = [field for field in result if field not in FIELDS]
    if missing or unknown:
        raise InputError(
            f"results row: fields {missing + unknown} are missing or not known; "
            f"use exactly {', '.join(FIELDS)}."
        )
    number, whole = int | float, int | None
    for field, good, rule in (
        ("table", is_name(result["table"]), "letters, digits and _ . + -"),
        ("row", is_name(result["row"]), "letters, digits and _ . + -"),
        ("metric", is_name(result["metric"]), "letters, digits and _ . + -"),
        ("value", isinstance(result["value"], number) and math.isfinite(result["value"]), "a finite number"),
        ("unit", isinstance(result["unit"], str) and result["unit"], "a unit such as nats/token, ms or 1"),
        ("seed", isinstance(result["seed"], whole) and result["seed"] is not True, "a whole number or None"),
        ("device", is_name(result["device"]), "a name such as cpu or h200"),
        ("config", isinstance(result["config"], dict), "a dict"),
        ("command", isinstance(result["command"], str) and result["command"], "a command line"),
        ("versions", isinstance(result["versions"], dict), "a dict of package versions"),
        ("date", _is_date(result["date"]), "a day such as 2026-11-30"),
    ):
        if not good:
            raise InputError(f"results row: {field} {result[field]!r} is not allowed; use {rule}.")
    path = re.search(r"""(?<![\w.)/])/[\w.-]+/[^\s"]*""", json.dumps([result["config"], result["command"]]))
    if path:
        raise InputError(
            f"results row: {path.group()!r} is a path of this machine; name data by corpus and sha256."
        )


def _is_date(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None


def is_name(value) -> bool:
    """Whether a row, metric or device may be called so."""
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) is not None


def check_row_flag(results: str | None, row: str | None, table: str = "own") -> None:
    """Looks at names before anything is run: one that is not allowed would be noticed at the end only.

    Args:
      results: the value of --results; without one, nothing is recorded.
      row: the value of --row.
      table: the value of --table.

    Raises:
      InputError: the name is missing or not allowed.
    """
    if results and not row:
        raise InputError(
            "--row is missing; --results needs a name for its rows, e.g. --row=tree_hard_P12_W1."
        )
    if results and not is_name(row):
        raise InputError(f"--row: {row!r} is not allowed; use letters, digits and _ . + -.")
    if results and not is_name(table):
        raise InputError(f"--table: {table!r} is not allowed; use letters, digits and _ . + -.")


def public_config(config, data_meta: dict) -> dict:
    """Resolved config that says what the data are, not where, and does not name the models it began with.

    Args:
      config: the run's config.
      data_meta: facts of the prepared corpus.
    """
    config = resolved(config)
    data = {
        key: value for key, value in config["data"].items() if key in ("corpus", "valid_share", "text_field")
    }
    data |= {key: data_meta[key] for key in DATA_FACTS if key in data_meta}
    finetune = {name: value for name, value in config.get("finetune", {}).items() if name not in MODEL_PATHS}
    return {**config, "data": data} | ({"finetune": finetune} if "finetune" in config else {})


def config_hash(config) -> str:
    """12 hex digits of a config's content; its `seed` is left out, so that seeds can be averaged.

    So is its version: where that is all that is new, the later row supersedes the older one.
    """
    values = {key: value for key, value in resolved(config).items() if key not in ("seed", "config_version")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def load_results(paths) -> list[dict]:
    """Rows of results files by date, without those that a later row supersedes.

    Rows of one day stand in the order of files and lines.

    Configs of older versions are read as they would be recorded now (see `tree_ffn/upgrades.py`).

    Args:
      paths: files or globs, e.g. "results/*.jsonl", or a list of them.

    Raises:
      InputError: names the file and line that is no row.
    """
    rows = {}
    for pattern in [paths] if isinstance(paths, str) else paths:
        for path in expanded(pattern) or [pattern]:
            for row in _read_rows(path):
                key = tuple(row[field] for field in KEY)
                if key not in rows or rows[key]["date"] <= row["date"]:
                    rows.pop(key, None)
                    rows[key] = row
    return sorted(rows.values(), key=lambda row: row["date"])


def _read_rows(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"results: {path} cannot be read ({reason(error)}).") from error
    values = (json.loads(line) for line in lines if line.strip())
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    read = from_lines(values, unit_of)
    for number in numbers:
        try:
            rows = next(read)
            config = rows[0]["config"] if rows else {}  # all rows of a line are of one run
            digest, known = config_hash(config), upgraded(config)
            for row in rows:
                row["config_hash"] = digest
                check_row(row)
                yield {**row, "config": known, "metric": RENAMED.get(row["metric"], row["metric"])}
        except KeyError as error:
            raise InputError(f"results: {path}, line {number}: it has no {error}.") from error
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"results: {path}, line {number}: {error}") from error


def append_figures(
    path: str, figures: dict[str, float], *, table: str, row: str, config, data_meta: dict,
    command: str | None = None,
) -> None:  # fmt: skip
    """Appends the figures of one run or evaluation: one row each for loss, ppl, usage and so on.

    Per-layer figures (`dead_leaves/0`, ...) become their mean over the layers. All rows are written at
    once: a run is recorded whole, or not at all.

    Args:
      path: results file.
      figures: as `train` returns them; `loss` is that of the validation split.
      table, row: names of the rows.
      config: the run's config.
      data_meta: facts of its corpus.
      command: as in `append_result`.
    """
    known = public_config(config, data_meta)
    means: dict[str, list[float]] = {}
    for name, value in figures.items():
        metric = {"loss": "val_loss"}.get(name, name).split("/")[0]
        if metric in UNITS:
            means.setdefault(metric, []).append(value)
    results = []
    for metric, values in means.items():
        # A timing says nothing about a seed.
        seed = None if UNITS[metric] in ("s", "ms", "tokens/s") else known["seed"]
        value = sum(values) / len(values)
        results.append(make_row(table, row, metric, value, seed, known, command=command))
    append_rows(path, results)


def append_text_figures(
    path: str, text: str, figures: dict[str, float], *, table: str, row: str, config, data_meta: dict,
    sha256: str, command: str | None = None,
) -> None:  # fmt: skip
    """Appends the figures of a run on another text: metrics such as `novels_loss`, `wikitext2_word_ppl`.

    The row is the run's own line of a table, so its config is the run's, with
    the text under `scored`. All rows are written at once.

    Args:
      path: results file.
      text: its name, the first part of the metrics' names.
      figures: as `evaluate_whole` returns them.
      table, row: names of the rows.
      config: the run's config.
      data_meta: facts of the corpus it was trained on.
      sha256: of the text.
      command: by default this process's own.
    """
    known = {**public_config(config, data_meta), "scored": {"name": text, "sha256": sha256}}
    results = [
        make_row(
            table, row, f"{text}_{name}", value, known["seed"], known,
            unit={"loss": "nats/token"}.get(name) or UNITS[name], command=command,
        )
        for name, value in figures.items()
    ]  # fmt: skip
    append_rows(path, results)
