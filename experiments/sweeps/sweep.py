"""Sweeps as data: the rows of a sweep file, each checked against its config.

A sweep file (configs/sweeps/*.py) has `get_sweep(arg=None)`. It returns a dict of plain values:

    config   file of the config that every row starts from
    table    of the results rows
    set      {key: value} of all rows
    seeds    of rows that name none; [0] by default
    rows     {name: {set, seeds, kind}}
    grids    list of {name, over, set, seeds, kind}: a row for every combination of `over` = {key: values};
             `name` and `kind` are patterns such as "tree_{activation}_{lr}" over the last parts of its keys
    tuning   {key, values, set, seeds, extensions}: the learning rates that each kind of row tries first

A key with a dot is one of the config (`optim.lr`); a key without a dot is an argument of the config file
(`length`). `{seed}` in a text is the row's seed: of fine-tuning (configs/finetune.py), say, which begins with
a model of that seed. Rows of one `kind` (by default each row is its own) share what is tuned.
"""

import difflib
import importlib.util
import itertools
import os
from typing import Any, NamedTuple

from experiments.common.config_words import check_config, config_of, last_line, words_of, written
from experiments.reporting.record import is_name
from experiments.sweeps.tuning import Grid
from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.plain import flat
from tree_ffn.training.plan import resolved

FIELDS = {
    "sweep": ("config", "table", "set", "seeds", "rows", "grids", "tuning"),
    "row": ("set", "seeds", "kind"),
    "grid": ("name", "over", "set", "seeds", "kind"),
    "tuning": ("key", "values", "set", "seeds", "extensions"),
}
TEXT, DICT, LIST = (str, "text"), (dict, "a dict whose keys are text"), (list | tuple, "a list")
SHAPES = {
    "config": TEXT, "table": TEXT, "name": TEXT, "kind": TEXT, "key": TEXT,
    "set": DICT, "rows": DICT, "over": DICT, "grids": LIST,
}  # fmt: skip


class Row(NamedTuple):
    """A line of the table to come: its name, what it is tuned as, its values by key, its seeds."""

    name: str
    kind: str
    values: dict[str, Any]
    seeds: tuple[int, ...]


class Sweep(NamedTuple):
    """A sweep file, expanded; `tuning_set` are the values that tuning runs have beside their row's."""

    config_file: str
    table: str
    rows: tuple[Row, ...]
    grid: Grid | None
    tuning_set: dict[str, Any]
    tuning_seeds: tuple[int, ...]


def load_sweep(path: str, common: dict[str, Any] | None = None) -> Sweep:
    """Reads a sweep file and checks every row of it; nothing is trained, no text is read.

    Args:
      path: the file, with `:key=value,...` after it where get_sweep takes an argument.
      common: values of all rows that the command line gives, such as `data.files`.

    Raises:
      InputError: the file is no sweep, or a row's key or value is not allowed by its config.

    Example:
      >>> len(load_sweep("configs/sweeps/t4_cpu.py").rows) > 4       # doctest: +SKIP
      True
    """
    return expand(read_sweep(path), common or {})


def read_sweep(path: str) -> dict:
    """What get_sweep of a file returns."""
    file, colon, argument = path.partition(":")
    if not os.path.isfile(file):
        raise InputError(f"--sweep: {file!r} is not a file; name one such as configs/sweeps/t4_cpu.py.")
    spec = importlib.util.spec_from_file_location("sweep", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--sweep: {file!r} is not allowed; use a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_sweep(argument) if colon else module.get_sweep()
    except Exception as error:  # whatever the file does wrong is said in one sentence
        raise InputError(f"--sweep: {file}: {type(error).__name__}: {last_line(error)}") from error


def expand(data: dict, common: dict[str, Any]) -> Sweep:
    """The rows of a sweep, each with all its values, checked.

    Args:
      data: as get_sweep returns it.
      common: values of all rows; they win over those of `set`, and may not be what the rows differ in.
    """
    _check_fields("sweep", data)
    for field in ("config", "table"):
        if field not in data:
            raise InputError(f"sweep: {field} is missing; use all of config, table, and rows or grids.")
    if not is_name(data["table"]):
        raise InputError(f"sweep: table {data['table']!r} is not allowed; use letters, digits and _ . + -.")
    rows = [_row(name, entry, {}, data) for name, entry in data.get("rows", {}).items()]
    for grid in data.get("grids", ()):
        rows += _grid_rows(grid, data)
    if not rows:
        raise InputError("sweep: it has no rows; name some in rows or grids.")
    tuning = data.get("tuning", {})
    _check_fields("tuning", tuning)
    grid = Grid.of(tuning) if tuning else None
    sweep = Sweep(
        data["config"], data["table"], tuple(rows), grid, dict(tuning.get("set", {})),
        _seeds("tuning", tuning.get("seeds", [0])),
    )  # fmt: skip
    _check_names(rows)
    _check_common(data, common, grid)
    shared = dict(data.get("set", {}))
    rows = [row._replace(values=shared | row.values | common) for row in rows]
    sweep = sweep._replace(rows=tuple(rows))
    check_rows(sweep)
    return sweep


def _row(name: str, entry: dict, over: dict, data: dict) -> Row:
    _check_fields("row", entry, name)
    seeds = _seeds(f"row {name}", entry.get("seeds", data.get("seeds", [0])))
    return Row(name, entry.get("kind", name), dict(entry.get("set", {})) | over, seeds)


def _grid_rows(grid: dict, data: dict) -> list[Row]:
    """A row for every combination, the last key fastest."""
    _check_fields("grid", grid)
    over, name = grid.get("over", {}), grid.get("name", "")
    for key, values in over.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"sweep grid {name}: {key} {values!r} is not allowed; use a list of its values.")
    seeds = grid.get("seeds", data.get("seeds", [0]))
    rows = []
    for values in itertools.product(*over.values()):
        point = dict(zip(over, values))
        shown = {key.rsplit(".", 1)[-1]: written(value) for key, value in point.items()}
        named, kind = (_filled(field, grid.get(field, name), shown) for field in ("name", "kind"))
        rows.append(_row(named, {"set": grid.get("set", {}), "seeds": seeds, "kind": kind}, point, data))
    return rows


def _filled(field: str, pattern: str, shown: dict[str, str]) -> str:
    """The name or kind of a combination."""
    try:
        return pattern.format(**shown)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"sweep grid: {field} {pattern!r} is not allowed; use the keys {', '.join(shown)} in braces."
        ) from error


def _check_fields(what: str, entry, name: str = "") -> None:
    said = f"sweep {what} {name}".strip() if what != "sweep" else "sweep"
    if not isinstance(entry, dict):
        raise InputError(f"{said}: {entry!r} is not allowed; use a dict of {', '.join(FIELDS[what])}.")
    for field, value in entry.items():
        check_choice(f"{said} field", field, FIELDS[what])
        shape, allowed = SHAPES.get(field, (object, ""))
        keys = value if isinstance(value, dict) else ()
        if not isinstance(value, shape) or not all(isinstance(key, str) for key in keys):
            raise InputError(f"{said}: {field} {value!r} is not allowed; use {allowed}.")


def _seeds(said: str, seeds) -> tuple[int, ...]:
    if not isinstance(seeds, list | tuple) or not seeds:
        raise InputError(f"sweep {said}: seeds {seeds!r} is not allowed; use a list such as [0, 1, 2].")
    for seed in seeds:
        check_positive_int(f"sweep {said}: seed", seed, least=0)
    return tuple(dict.fromkeys(seeds))


def _check_names(rows: list[Row]) -> None:
    seen = set()
    for row in rows:
        for name in (row.name, row.kind):
            if not is_name(name):
                raise InputError(f"sweep row: name {name!r} is not allowed; use letters, digits and _ . + -.")
        if row.name in seen:
            raise InputError(f"sweep row: {row.name!r} is there twice; give each row a name of its own.")
        seen.add(row.name)


def _check_common(data: dict, common: dict[str, Any], grid: Grid | None) -> None:
    """A value of all rows may not be what they differ in: that would make them equal in silence."""
    own = {key for grid in data.get("grids", ()) for key in grid.get("over", {})}
    entries = [*data.get("rows", {}).values(), *data.get("grids", ())]
    own |= {key for entry in entries for key in entry.get("set", {})}
    own |= {grid.key} if grid else set()
    for key in common:
        if key in own or key == "seed":
            raise InputError(f"--set: {key} is not allowed; rows of the sweep have their own values of it.")


def check_rows(sweep: Sweep) -> None:
    """Raises InputError for a key that is not in the config, or a value that it does not take."""
    if not os.path.isfile(sweep.config_file):
        raise InputError(f"sweep: config {sweep.config_file!r} is not a file; name one of configs/.")
    known = flat(resolved(config_of(words_of(sweep.config_file, {}))))
    tuned = sweep.tuning_set | ({sweep.grid.key: sweep.grid.values[0]} if sweep.grid else {})
    for row in sweep.rows:
        for key in row.values | tuned:
            _check_key(key, known, sweep.config_file)
        for values in [row.values] + ([row.values | tuned] if sweep.grid else []):
            try:
                check_config(config_of(words_of(sweep.config_file, values)))
            except InputError as error:
                raise InputError(f"sweep row {row.name}: {error}") from error


def _check_key(key: str, known: dict, file: str) -> None:
    if key == "seed":
        raise InputError("sweep key: 'seed' is not allowed; name seeds in the field seeds.")
    if "." in key and key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(
            f"sweep key: {key!r} is not in {file}{meant}; use a key such as optim.lr, or without a dot an "
            "argument of that file."
        )
