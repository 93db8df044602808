"""Sweeps: what they run and skip, what they refuse, how learning rates are chosen; with real, tiny runs."""

import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import time

import pytest

from experiments.common import processes
from experiments.common.config_words import config_of
from experiments.reporting import record
from experiments.sweeps import runners, sweep_runs
from tests.experiments.programs import call
from tree_ffn.errors import InputError
from tree_ffn.training import step
from tree_ffn.training.signals import Interrupted, StopSignals

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def place(texts, tmp_path, monkeypatch):
    """A function that writes a sweep file and runs the program on it."""
    monkeypatch.chdir(ROOT)
    common = {
        "data.files": f"{texts}/*.txt", "data.cache_dir": f"{texts}/cache",
        "data.workers": 0, "mesh.data": 1, "train.probe": False,
    }  # fmt: skip

    def ablate(rows, *arguments, **more):
        data = {"config": "configs/smoke.py", "table": "t4_small", "set": {"steps": 2}, "rows": rows, **more}
        (tmp_path / "sweep.py").write_text(f"def get_sweep():\n    return {data!r}\n")
        names = [f"--set={key}={value}" for key, value in common.items()]
        files = [f"--results={tmp_path}/r.jsonl", f"--workdir={tmp_path}/runs"]
        return call("ablate", f"--sweep={tmp_path}/sweep.py", *files, *names, *arguments)

    return ablate


def losses(path):
    """{(row, seed, learning rate): validation loss} of a results file."""
    rows = record.load_results([str(path)])
    return {
        (row["row"], row["seed"], row["config"]["optim"]["lr"]): row["value"]
        for row in rows
        if row["metric"] == "val_loss"
    }


WILD = {"kind": "narrow", "optim.lr": 1e30, "optim.clip_norm": 0.0}


ROWS = {
    "tree_hard": {"set": {"ffn.kind": "tree", "ffn.node_width": (1,)}, "seeds": [0, 1]},
    "narrow": {"set": {"kind": "narrow"}},
}


def test_rows_are_run_recorded_and_not_run_again(place, tmp_path, monkeypatch):
    assert "2 to do: narrow" not in place(ROWS, "--dry").out
    traced, train_step = [], step.train_step
    monkeypatch.setattr(step, "train_step", lambda *a, **k: traced.append(0) or train_step(*a, **k))
    outcome = place(ROWS, "--rows=tree", "--keep_runs=false")
    assert outcome.code == 0, outcome.err
    assert len(traced) == 1  # two seeds, one program
    assert losses(tmp_path / "r.jsonl").keys() == {("tree_hard", 0, 1e-3), ("tree_hard", 1, 1e-3)}
    left = set(os.listdir(tmp_path / "runs" / "tree_hard_seed0"))
    assert {"config.json", "metrics.jsonl"} <= left and not left & {"checkpoints", "tensorboard"}

    text = (tmp_path / "r.jsonl").read_text()
    assert str(tmp_path) not in text
    said = shlex.split(json.loads(text.splitlines()[1])["command"])  # behind its config
    assert said[:3] == ["python", "-m", "experiments.train"] and "--row=tree_hard" in said
    assert "--config=configs/smoke.py:steps=2" in said and "--config.ffn.node_width=(1,)" in said

    outcome = place(ROWS)
    assert outcome.code == 0 and "2 of them are done" in outcome.out and "tree_hard_seed" not in outcome.out
    assert (tmp_path / "r.jsonl").read_text().startswith(text)
    assert len(losses(tmp_path / "r.jsonl")) == 3
    dry = place(ROWS, "--dry").out
    assert "3 runs, 0 to do" in dry and "narrow_seed0, lr 0.001, 2 steps" in dry


def test_a_row_that_fails_is_reported_and_the_others_go_on(place, tmp_path):
    rows = {
        "wild": {"set": WILD},
        "narrow": ROWS["narrow"],
    }
    outcome = place(rows)
    assert outcome.code == 1
    assert "1 of the runs failed:\n  wild_seed0: step" in outcome.err
    assert losses(tmp_path / "r.jsonl").keys() == {("narrow", 0, 1e-3)}

    # The same row with another value is another run, and its workdir is not the old one's.
    rows = {"narrow": ROWS["narrow"]}
    outcome = place(rows, "--set=optim.lr=0.01")
    assert outcome.code == 1 and "optim.lr (0.001 there, 0.01 here); use its config" in outcome.err
    assert place(rows, "--set=optim.lr=0.01", f"--workdir={tmp_path}/other").code == 0
    assert losses(tmp_path / "r.jsonl").keys() == {("narrow", 0, 1e-3), ("narrow", 0, 1e-2)}


def test_passes_over_the_text_are_said(place, tmp_path):
    """Some 24,000 bytes in rows of 32: the longer run reads them more than 4 times."""
    rows = {
        "short": {"set": {"kind": "narrow", "steps": 2}},
        "long": {"set": {"kind": "narrow", "steps": 800}},
    }
    outcome = place(rows, "--dry")
    (passes,) = re.findall(r"([\d.]+) passes over its text in the longest run$", outcome.out, re.MULTILINE)
    assert float(passes) > 4
    assert f"the training text will be read {passes} times: beyond 4 times, other text" in outcome.out
    outcome = place({"short": rows["short"]}, "--dry")
    assert "passes over its text" in outcome.out and "beyond 4 times" not in outcome.out


def test_arithmetic_hours_and_memory_are_said():
    """Of one run of T1's size: three times the forward pass of a dense model, whatever is chosen."""
    file = importlib.import_module("configs.t1_small")
    config = file.get_config("row=leaf_X512_K16")
    config.data.tokenizer = "bytes"
    run = sweep_runs.Run("t", "r", 0, config, [], "", "")
    E, F, context, layers, V = 768, 3072, 512, 8, 257
    forward = layers * (8 * E**2 + 2 * E * (context + 1) + 4 * E * F) + 2 * E * V
    flops = 3 * forward * 1831 * 64 * context
    said = sweep_runs.needs([run, run])
    assert said.startswith(f"{2 * flops / 1e15:,.1f} PFLOP with every unit computed: 0.0 hours of an H200 at")
    weights = layers * (4 * E**2 + 2 * F * E + 511 * E) + E * (V + context)  # without biases and norms
    (gigabytes,) = re.findall(r"take ([\d.]+) GB at most", said)
    assert float(gigabytes) == pytest.approx(16 * weights / 1e9, abs=0.06)


def test_commands_for_a_cluster(place, tmp_path):
    outcome = place(ROWS, "--print")
    assert outcome.code == 0 and not (tmp_path / "r.jsonl").exists()
    lines = outcome.out.splitlines()
    assert len(lines) == 3
    words = shlex.split(lines[0])
    assert words[:3] == ["python", "-m", "experiments.train"]
    config = config_of([word for word in words if word.startswith("--config")])
    assert (config.seed, config.ffn.kind, config.train.steps) == (0, "tree", 2)
    # One of them, as a cluster would run it, is done for the sweep.
    assert call("train", *words[3:]).code == 0
    assert len(place(ROWS, "--print").out.splitlines()) == 2


def test_a_signal_ends_the_sweep_and_says_how_to_go_on(place, tmp_path, monkeypatch):
    def interrupted(config, workdir, **_):
        raise Interrupted(
            f"the state is saved in {workdir}: run the same command again to resume.", signal.SIGINT
        )

    monkeypatch.setattr(runners, "train", interrupted)
    outcome = place(ROWS)
    assert outcome.code == 130 and outcome.err.endswith("run the same command again to resume.\n")
    assert "tree_hard_seed0:" in outcome.out and "tree_hard_seed1:" not in outcome.out


def test_a_signal_to_a_sweep_of_processes(place, tmp_path, monkeypatch):
    """The processes save and end before the sweep does; the same command goes on from there."""
    began = time.monotonic()

    class StopsSoon(StopSignals):
        received = property(
            lambda self: signal.SIGTERM if self._trained() else None, lambda self, value: None
        )

        def _trained(self):
            assert time.monotonic() - began < 120
            return (tmp_path / "runs" / "narrow_seed0" / "metrics.jsonl").exists()

    rows = {"narrow": {"set": {"kind": "narrow", "steps": 5000}}}
    monkeypatch.setattr(processes, "StopSignals", StopsSoon)
    outcome = place(rows, "--jobs=1")
    assert outcome.code == 143 and "run the same command again to go on" in outcome.err
    log = (tmp_path / "runs" / "narrow_seed0" / "log.txt").read_text()
    assert "stopped by SIGTERM" in log and not (tmp_path / "r.jsonl").exists()


def test_processes(place, tmp_path):
    rows = {"narrow": ROWS["narrow"], "wild": {"set": WILD}}
    outcome = place(rows, "--jobs=2")
    assert outcome.code == 1 and "wild_seed0: step" in outcome.err and "log.txt" in outcome.err, outcome.err
    assert "validation loss" in (tmp_path / "runs" / "narrow_seed0" / "log.txt").read_text()
    assert len(losses(tmp_path / "r.jsonl")) == 1 and "narrow_seed0: done" in outcome.out


def test_rates_are_tuned_and_the_grid_grows_at_its_edge(place, tmp_path):
    """Of three far too small rates the largest is best, and after one extension the next."""
    first = "1 of 1 kinds: optim.lr as in the config"
    grid = {"values": [1e-5, 2e-5, 4e-5], "extensions": 1, "set": {"optim.warmup_steps": 1}}
    rows = {"narrow": ROWS["narrow"]}
    assert "3 runs to choose a rate by" in place(rows, "--tune", "--dry", tuning=grid).out
    assert first in place(rows, "--dry", tuning=grid).out
    outcome = place(rows, "--tune", tuning=grid)
    assert outcome.code == 0, outcome.err
    tried = losses(tmp_path / "r_tuning.jsonl")
    assert {key[2] for key in tried} == {1e-5, 2e-5, 4e-5, 8e-5}
    assert losses(tmp_path / "r.jsonl").keys() == {("narrow", 0, 8e-5)}
    assert "narrow: optim.lr 8e-05, at the edge of all that was tried" in outcome.out
    again = place(rows, "--tune", tuning=grid)
    assert "1 runs, 1 of them are done" in again.out and "to choose" not in again.out


@pytest.mark.slow
def test_rows_of_a_kind_whose_every_rate_diverged_are_not_run(place, tmp_path):
    grid = {"values": [1e29, 1e30, 1e31], "extensions": 1}
    rows = {"wild": {"set": {"kind": "narrow", "optim.clip_norm": 0.0}}}
    outcome = place(rows, "--tune", tuning=grid)
    assert outcome.code == 1
    why = "every run of their grid diverged, down to optim.lr 5e+28"
    assert f"1 of the runs failed:\n  rows of wild: not run, since {why}" in outcome.err
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    "rows,more,arguments,said",
    [
        ({"a": {"set": {"optim.lrr": 1}}}, {}, [], "'optim.lrr' is not in configs/smoke.py (did you mean"),
        ({"a": {"set": {"stesp": 1}}}, {}, [], "config argument: 'stesp=1' is not known"),
        ({"a": {"set": {"train.batch_size": "many"}}}, {}, [], "sweep row a: "),
        ({"a": {"set": {"ffn.kind": "maple"}}}, {}, [], "ffn.kind: 'maple' is not known"),
        ({"a b": {}}, {}, [], "name 'a b' is not allowed"),
        ({"a": {"lr": 1}}, {}, [], "sweep row a field: 'lr' is not known; use one of: set, seeds, kind."),
        ({"a": {"seeds": 3}}, {}, [], "seeds 3 is not allowed; use a list"),
        ({"a": {"set": {"seed": 3}}}, {}, [], "'seed' is not allowed; name seeds in the field seeds"),
        ({}, {}, [], "it has no rows"),
        ({"a": {}}, {"table": "t 9"}, [], "sweep: table 't 9' is not allowed"),
        ({"a": {}}, {"config": "configs/no.py"}, [], "config 'configs/no.py' is not a file"),
        ({"a": {}}, {"tuning": {"values": [1.0]}}, [], "values [1.0] is not allowed; use at least 3"),
        ({"a": {}}, {}, ["--tune"], "has no tuning"),
        ({"a": {}}, {}, ["--rows=b"], "--rows: 'b' finds none of: a."),
        ({"a": {}}, {}, ["--set=lr"], "--set: 'lr' is not allowed; use KEY=VALUE"),
        ({"a": {"set": {"kind": "tree"}}}, {}, ["--set=kind=dense"], "--set: kind is not allowed;"),
        ({"a": {}}, {}, ["--gpus=x"], "--gpus: 'x' is not allowed"),
        ({"a": {}}, {}, ["--jobs=-1"], "--jobs: -1 is not allowed"),
        ({"a": {}}, {"grids": [{"name": "a", "over": {"optim.lr": [1, 2]}}]}, [], "'a' is there twice"),
        (["a"], {}, [], "sweep: rows ['a'] is not allowed; use a dict whose keys are text."),
        ({"a": {"set": ["lr"]}}, {}, [], "sweep row a: set ['lr'] is not allowed; use a dict"),
        ({"a": {}}, {"grids": {"name": "a"}}, [], "sweep: grids {'name': 'a'} is not allowed; use a list."),
        ({}, {"grids": [{"name": "b", "over": {"optim.lr": 0.1}}]}, [], "optim.lr 0.1 is not allowed; use"),
        ({}, {"grids": [{"name": 3, "over": {"optim.lr": [1]}}]}, [], "sweep grid: name 3 is not allowed"),
        ({}, {"grids": [{"name": "b", "kind": "{b}", "over": {"optim.lr": [1]}}]}, [], "grid: kind '{b}'"),
        ({"a": {}}, {"tuning": {"values": [1, 2, [3]]}}, [], "values [1, 2, [3]] is not allowed"),
        ({"a": {}}, {"tuning": {"key": 5, "values": [1, 2, 3]}}, [], "sweep tuning: key 5 is not allowed"),
        ({"a": {}}, {"grids": [{"name": "{rate}", "over": {"optim.lr": [1]}}]}, [], "use the keys lr"),
    ],
)  # fmt: skip
def test_what_is_refused(place, tmp_path, rows, more, arguments, said):
    outcome = place(rows, *arguments, **more)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert outcome.out == "" and os.listdir(tmp_path) == ["sweep.py"]


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([], "--sweep is missing"),
        (["--sweep=x"], "--results is missing"),
        (["--sweep=x", "--results=r.jsonl"], "--workdir is missing"),
        (["--sweep=x", "--results=r.jsonl", "--workdir=w"], "--sweep: 'x' is not a file"),
        (["--sweep=x", "--results=r_tuning.jsonl", "--workdir=w"], "of the runs that choose learning rates"),
    ],
)
def test_flags_that_are_missing(arguments, said):
    outcome = call("ablate", *arguments)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_text_that_is_not_there_stops_a_sweep_before_its_first_run(place, tmp_path):
    outcome = place({"a": {"set": {"kind": "narrow"}}}, "--set=data.valid_files=nowhere.txt")
    assert outcome.code == 2 and "'nowhere.txt' matches no file" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_other_texts_are_scored_at_the_end_of_each_row(place, texts, tmp_path):
    other = f"--texts=some={texts}/[0-2].txt"
    assert f"--texts=some={texts}" in place(ROWS, "--rows=narrow", other, "--print").out
    outcome = place(ROWS, "--rows=narrow", other)
    assert outcome.code == 0 and "some: loss" in outcome.out, outcome.err
    rows = record.load_results([f"{tmp_path}/r.jsonl"])
    scored = {row["metric"]: row for row in rows if row["metric"].startswith("some_")}
    assert set(scored) == {f"some_{name}" for name in ("loss", "bits_per_byte", "nats_per_word", "word_ppl")}
    assert all("--texts=some=" in row["command"] for row in scored.values())
    assert "1 runs, 1 of them are done" in place(ROWS, "--rows=narrow", other).out
    refused = place(ROWS, "--texts=some=absent.txt")
    assert refused.code == 2 and "matches no file" in refused.err


@pytest.mark.slow
def test_a_row_whose_texts_could_not_be_scored_is_not_done(place, texts, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise InputError("some: it cannot be read.")

    other = f"--texts=some={texts}/[0-2].txt"
    with monkeypatch.context() as patch:
        patch.setattr(runners.texts, "score_at_end", fails)
        outcome = place(ROWS, "--rows=narrow", other)
        assert outcome.code == 1 and "narrow_seed0: some: it cannot be read." in outcome.err
    outcome = place(ROWS, "--rows=narrow", other)  # goes on from its checkpoint
    assert outcome.code == 0 and "resumed at step 2 of 2" in outcome.out, outcome.err
    metrics = {row["metric"] for row in record.load_results(f"{tmp_path}/r.jsonl")}
    assert {"val_loss", "some_loss"} <= metrics
