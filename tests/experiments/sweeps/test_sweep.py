"""Sweep files: their rows, those of this repository, and which recorded run is one of them."""

import pathlib

import pytest

from experiments.common.config_words import config_of, words_of
from experiments.reporting import record
from experiments.sweeps import sweep
from experiments.sweeps.sweep_runs import same_run
from tree_ffn.upgrades import VERSION

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


def test_a_grid_is_every_combination(monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = {
        "name": "tree_{activation}_{lr}", "kind": "tree_{activation}", "seeds": [3],
        "over": {"ffn.activation": ["gelu", "relu"], "optim.lr": [0.1, 0.2]},
    }  # fmt: skip
    rows = sweep.expand({"config": "configs/smoke.py", "table": "t4_small", "grids": [grid]}, {}).rows
    assert [row.name for row in rows] == ["tree_gelu_0.1", "tree_gelu_0.2", "tree_relu_0.1", "tree_relu_0.2"]
    assert rows[3] == ("tree_relu_0.2", "tree_relu", {"ffn.activation": "relu", "optim.lr": 0.2}, (3,))


N_ROWS = {
    "t1": 4,
    "t1_cpu": 7,
    "t1_small": 9,
    "t4_cpu": 12,
    "t4_small": 22,
    "quickstart": 18,
    "conversion": 12,
    "fairness": 17,
    "leaves": 34,
    "longer": 14,
    "decay": 12,
    "steps": 3,
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sweeps").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_the_sweeps_of_the_repository(path, monkeypatch):
    """Every row of each is allowed; where a text is needed, its name is enough."""
    monkeypatch.chdir(ROOT)
    rows = sweep.load_sweep(str(path), {"data.files": "x.txt"}).rows
    assert len(rows) == N_ROWS[path.stem]
    assert sum(len(row.seeds) for row in rows) >= len(rows)


def test_the_recorded_grid_of_t1_small_is_known(monkeypatch):
    """Its rows were made by hand when configs had other keys; the sweep finds them all the same."""
    monkeypatch.chdir(ROOT)
    found = [
        row for row in record.load_results(["results/t1_small_tuning.jsonl"]) if row["metric"] == "val_loss"
    ]
    loaded = sweep.load_sweep("configs/sweeps/t1_small.py", {"data.files": "x.txt"})
    for row in loaded.rows:
        for value in loaded.grid.values if row.name != "leaf_X512_K16" else ():  # newer than the grid
            values = row.values | loaded.tuning_set | {"optim.lr": value}
            config = config_of(words_of(loaded.config_file, values))
            known = [r for r in found if r["row"] == row.name and r["config"]["optim"]["lr"] == value]
            assert len(known) == 1
            meta = known[0]["config"]["data"]
            assert same_run(known[0]["config"], record.public_config(config, meta))


def test_what_is_the_same_run():
    recorded = {
        "optim": {"lr": 1e-3}, "ffn": {"kind": "tree", "depth": 3}, "data": {"sha256": "1"}, "seed": 0,
        "train": {"steps": 9}, "config_version": VERSION,
    }  # fmt: skip
    same = {**recorded, "train": {"steps": 9, "log_every": 7, "probe": True}, "mesh": {"data": 4}}
    same |= {"ffn": {"kind": "tree", "depth": 3, "top_k": 4}}  # which trees do not read
    assert same_run(recorded, same)
    for other in (
        {"train": {"steps": 8}}, {"optim": {"lr": 2e-3}}, {"data": {"sha256": "2"}},
        {"ffn": {"kind": "tree", "depth": 4}},
    ):  # fmt: skip
        assert not same_run(recorded, {**same, **other})
