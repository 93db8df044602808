"""A trace of some steps, and metrics on Weights & Biases, where they are asked for."""

import importlib.util
import json

import pytest

from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.training.extras import wandb_writer
from tree_ffn.training.loop import train
from tree_ffn.training.plan import TrainSpec


def run(texts, workdir, **changes):
    train(tiny_config(texts, "dense", **changes), str(workdir), log=lambda _: None, bar=False)


@pytest.mark.slow
def test_three_steps_are_traced(texts, tmp_path):
    run(texts, tmp_path, steps=5, train__profile_at=1)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


def test_a_trace_that_would_not_end_is_refused():
    with pytest.raises(
        InputError, match="train.profile_at: 8 is not allowed; use at most train.steps - 3 = 7, or 0"
    ):
        TrainSpec(steps=10, profile_at=8)
    assert TrainSpec(steps=10, profile_at=7).profile_at == 7


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_said_at_once(texts, tmp_path):
    with pytest.raises(
        InputError, match=r"train.wandb: 'trees' needs the package wandb; install tree_ffn\[wandb\]"
    ):
        run(texts, tmp_path / "run", train__wandb="trees")
    assert not (tmp_path / "run").exists()


def test_metrics_go_to_wandb_too(texts, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(texts, tmp_path, train__wandb="trees")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    write = wandb_writer("trees", run_id, str(tmp_path), {})
    write(7, {"train/loss": 1.0})
    write(None, {})
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")} == {run_id}
