"""Figures, the clock, and what the files hold."""

import contextlib
import dataclasses
import errno
import json
import math
import os
from unittest import mock

import numpy as np
import pytest

from tests.training.tiny import tiny_config, tiny_model
from tree_ffn.errors import InputError
from tree_ffn.progress import RunProgress
from tree_ffn.training.logger import MetricsWriter, Report
from tree_ffn.training.metrics import Throughput, costs, loss_metrics, usage_metrics
from tree_ffn.training.plan import plan_run
from tree_ffn.training.signals import Diverged
from tree_ffn.tree import PrunedSpec


def test_loss_in_three_units():
    metrics = loss_metrics(2.0, bytes_per_token=4.0)
    assert metrics == {"loss": 2.0, "ppl": math.exp(2.0), "bits_per_byte": 2.0 / math.log(2.0) / 4.0}
    assert "bits_per_byte" not in loss_metrics(2.0)
    assert math.isfinite(loss_metrics(1e6)["ppl"])


def test_usage_of_trees_is_numbered_by_layer_of_the_model():
    model = tiny_model(ffn__n_trees=1, ffn__depth=1, model__layers="dense,tree", model__n_layers=2)
    metrics = usage_metrics((None, np.array([[[3, 0]]], np.int32)), model)
    assert metrics == {
        "dead_leaves/1": 0.5, "leaf_entropy/1": 0.0, "constant_decisions/1": 1.0, "right_share/1": 0.0,
        "skew/1": 1.0,
    }  # fmt: skip


def test_pruned_leaves_are_not_dead():
    model = tiny_model(ffn__n_trees=1, ffn__depth=2, model__n_layers=1)
    pruned = PrunedSpec(model.ffns[0].shape, nodes=(1, 2, 3))
    counts = (np.array([[[3, 0, 0, 1]]], np.int32),)  # three leaves are kept, one of them is not visited
    metrics = usage_metrics(counts, dataclasses.replace(model, ffns=(pruned,)))
    assert metrics["dead_leaves/0"] == pytest.approx(1 / 3)
    assert metrics["leaf_entropy/0"] == usage_metrics(counts, model)["leaf_entropy/0"]


def test_usage_of_experts():
    model = tiny_model("leaf", ffn__n_experts=4, ffn__n_trees=1)
    counts = np.array([[[5, 5, 0, 0]], [[1, 1, 1, 1]]], np.int32)
    metrics = usage_metrics((counts,), model)
    expected = {"dead_leaves/0": 0.5, "leaf_entropy/0": 0.5, "dead_leaves/1": 0.0, "leaf_entropy/1": 1.0}
    assert metrics == pytest.approx(expected)


def test_active_share():
    dense, tree = costs(tiny_model("dense")), costs(tiny_model("tree"))
    assert dense["active_share"] == 1.0 and tree["active_share"] == 8 / 30
    assert dense["products"] == 2 * 16 and tree["products"] == 2 * 8
    assert tree["products_share"] == 16 / (8 * tiny_model("tree").width)


def test_the_clock_leaves_out_the_first_step_and_pauses():
    done_at = iter([100.0, 101.0, 150.0, 152.0])
    throughput = Throughput(clock=lambda: next(done_at))
    throughput.step(tokens=10)  # 100 s, most of them compiling
    assert throughput.take() is None
    throughput.step(tokens=10)
    assert throughput.take() == 10.0 / 1.0
    throughput.pause()  # 49 s of validation
    throughput.step(tokens=10)
    throughput.step(tokens=10)
    assert throughput.take() == 10.0 / 2.0
    assert throughput.take() is None


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_file_has_every_step_once(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "spl')  # the process was killed here
    writer = MetricsWriter(str(tmp_path), step=2)
    writer.write(3, "train", {"loss": 30.0})
    writer.close()
    assert read(tmp_path) == [
        {"step": 1, "split": "train", "loss": 1.0},
        {"step": 2, "split": "train", "loss": 2.0},
        {"step": 3, "split": "train", "loss": 30.0},
    ]


def test_tensorboard_reads_the_scalars_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(str(tmp_path))
    writer.write(7, "valid", {"loss": 1.5})
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("valid/loss")
    assert (scalar.step, scalar.value) == (7, 1.5)


def test_without_tensorboard_the_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.event_file_writer", None)
    writer = MetricsWriter(str(tmp_path))
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    assert len(read(tmp_path)) == 1 and not (tmp_path / "tensorboard").exists()


def test_an_unwritable_workdir_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="metrics.jsonl cannot be written"):
        MetricsWriter(str(tmp_path))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    writer = MetricsWriter(str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(writer._metrics, "_file", mock.Mock(write=mock.Mock(side_effect=full)))
        with pytest.raises(InputError, match="No space left"):
            writer.write(1, "train", {"loss": 1.0})
    writer.close()


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def on_a_full_disk(writer):
    """Swaps the open metrics.jsonl for a device that is full."""
    writer._metrics._file.close()
    writer._metrics._file = open("/dev/full", "a")
    return writer


@needs_full
def test_closing_on_a_full_disk_is_one_sentence_too(tmp_path):
    writer = on_a_full_disk(MetricsWriter(str(tmp_path)))
    with pytest.raises(InputError, match="metrics.jsonl cannot be written .No space left"):
        with contextlib.ExitStack() as stack:
            stack.callback(writer.close)
            writer.write(1, "train", {"loss": 1.0})
    assert writer._metrics._file.closed
    for events in writer._others:
        with pytest.raises(ValueError, match="closed"):  # the second was closed although the first failed
            events(2, {"loss": 1.0})


@needs_full
@pytest.mark.parametrize("error", [InputError("metrics.jsonl"), Diverged("step 6")])
def test_closing_does_not_hide_the_first_error(texts, tmp_path, error):
    report = Report(str(tmp_path), plan_run(tiny_config(texts)), 1.0, 0, print, False)
    on_a_full_disk(report._writer)._metrics._file.write("not flushed yet")
    with pytest.raises(type(error)) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(report)
        raise error
    assert caught.value is error


def test_a_file_in_place_of_the_events_is_one_sentence(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(InputError, match="tensorboard cannot be written .File exists"):
        MetricsWriter(str(tmp_path))


@needs_full
def test_events_on_a_full_disk_are_one_sentence(tmp_path, monkeypatch):
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(record_writer, "open_file", lambda path: full)
        with pytest.raises(InputError, match="tensorboard cannot be written .No space left"):
            MetricsWriter(str(tmp_path))


def test_events_that_fail_later_are_one_sentence(tmp_path, monkeypatch):
    writer = MetricsWriter(str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")  # as it is raised later
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_others", [mock.Mock(side_effect=full)])
        with pytest.raises(InputError, match="tensorboard cannot be written .No space left"):
            writer.write(1, "train", {"loss": 1.0})
    writer.close()


def test_plain_lines_on_a_pipe():
    lines = []
    progress = RunProgress(steps=9, start=0, log=lines.append, bar=False)
    progress.step(1, 2.5)
    values = {"loss": 2.5, "tokens_per_s": 1234.0, "dead_leaves/0": 0.1, "dead_leaves/1": 0.25}
    values |= {"leaf_entropy/0": 0.9, "leaf_entropy/1": 0.712, "constant_decisions/0": 0.12}
    progress.line(1, values, seconds_left=3725.0)
    progress.say("hello")
    progress.close()
    usage = "dead leaves <= 25%, entropy >= 0.71, constant <= 12%"
    assert lines == [f"step 1/9: loss 2.5000, 1,234 tokens/s, {usage}, 1:02:05 left", "hello"]


def test_a_bar_on_a_terminal(capsys):
    progress = RunProgress(steps=9, start=3, log=pytest.fail, bar=True)
    progress.line(4, {"loss": 2.5, "tokens_per_s": 1234.0, "dead_leaves/0": 0.1}, None)
    progress.step(5, 2.25)
    progress.say("hello")
    progress.close()
    shown = capsys.readouterr().err
    assert "5/9" in shown and "loss 2.250, 1,234 tokens/s, dead leaves <= 10%" in shown and "hello" in shown
