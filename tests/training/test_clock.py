"""Checkpoints and stops by time, and where the time of a run went."""

import re
import signal

import pytest

from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.training.checkpoint_files import steps_on_disk
from tree_ffn.training.clock import Clock
from tree_ffn.training.loop import train
from tree_ffn.training.plan import TrainSpec
from tree_ffn.training.signals import Interrupted


def run(texts, workdir, **changes) -> list[str]:
    said = []
    train(tiny_config(texts, "dense", **changes), str(workdir), log=said.append, bar=False)
    return said


def test_time_is_summed_up_over_starts_and_what_is_lost_too():
    now, wall = [0.0], [1000.0]
    first = Clock(lambda: now[0], lambda: wall[0])
    now[0] = 10
    first.to("steps")
    now[0] = 70
    with first.during("saving"):
        now[0] = 80
        kept = first.spent()
    assert kept["seconds"] == {
        "steps": 60, "reading": 0, "validation": 0, "saving": 10, "starting": 10, "lost": 0,
    }  # fmt: skip
    assert not first.saves(1) and not first.is_over(0.03)
    now[0] = 140
    with first.during("reading"):
        now[0] = 175
    assert first.share_of_reading() == 0.2 and first.share_of_reading() == 0
    assert first.saves(1) and first.is_over(0.03) and not first.saves(0) and not first.is_over(0)

    later, skewed = Clock(lambda: 0.0, lambda: 1020.0), Clock(lambda: 0.0, lambda: 500.0)
    later.goes_on({**kept, "until": 1000.0})
    skewed.goes_on({**kept, "until": 1000.0})  # the other machine's wall clock is behind
    assert (later.seconds["lost"], skewed.seconds["lost"], later.restarts) == (20, 0, 1)
    assert str(later) == "1:40 in all (restarts: 1): 60 % steps, 10 % saving, 10 % starting, 20 % lost"


def test_a_run_saves_by_time_and_stops_before_its_limit(texts, tmp_path):
    tenth = {"train__checkpoint_minutes": 1e-9, "train__checkpoint_every": 0, "train__eval_every": 0}
    said = run(texts, tmp_path / "run", steps=5, train__log_every=1, train__keep=9, **tenth)
    assert steps_on_disk(str(tmp_path / "run/checkpoints")) == [1, 2, 3, 4, 5]
    assert re.fullmatch(r"0:\d\d in all: .*% steps.*% saving.*% starting", said[-1])

    limited = {"steps": 5, "train__max_hours": 1e-9, "train__checkpoint_every": 0, "train__keep": 9}
    for step in (2, 4):  # looked at every two steps
        said = f"stopped by train.max_hours = 1e-09 after step {step} of 5"
        with pytest.raises(Interrupted, match=said) as stop:
            run(texts, tmp_path / "limited", **limited)
        assert stop.value.exit_code == 128 + signal.SIGTERM
    said = run(texts, tmp_path / "limited", **limited | {"train__max_hours": 0.0})
    assert "resumed at step 4 of 5" in said and "(restarts: 2)" in said[-1]


def test_some_checkpoints_are_kept_for_good(texts, tmp_path):
    run(texts, tmp_path, steps=8, train__checkpoint_every=1, train__keep=1, train__keep_every=3)
    assert set(steps_on_disk(str(tmp_path / "checkpoints"))) >= {3, 6, 8}


@pytest.mark.parametrize("field,value,allowed", [
    ("checkpoint_minutes", -1, "a number of at least 0"),
    ("max_hours", float("nan"), "a number of at least 0"),
    ("keep_every", 300, "a multiple of train.checkpoint_every = 200, or 0"),
    ("compile_cache", "s3://a", "name a local path"),
])  # fmt: skip
def test_what_is_refused(field, value, allowed):
    with pytest.raises(InputError, match=rf"train\.{field}: .*{allowed}"):
        TrainSpec(**{field: value})
