"""Granularity: which losses, which implementation, and that the committed picture is what results give."""

import pathlib
import re

import pytest

from experiments.reporting import granularity
from experiments.reporting.drawing import spoken
from experiments.reporting.registry import read_rows, tables_of

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


def timings(W, variant, direction="forward", tokens=1, **figures):
    spec = {"n_experts": 96 // W * 32, "expert_width": W, "top_k": 96 // W, "router": "tree"}
    config = {"spec": spec, "variant": variant, "width": 768, "tokens": tokens, "direction": direction}
    base = {"table": "granularity", "row": "r", "device": "cpu", "config": {**config, "dtype": "float32"}}
    return [{**base, "metric": metric, "value": value} for metric, value in figures.items()]


def loss(W, value, top_k=None, seed=0, **changed):
    ffn = {"kind": "leaf", "router": "tree", "gate_norm": "rms", "n_experts": 96 // W * 32, "expert_width": W}
    config = {"ffn": {**ffn, "top_k": top_k or 96 // W, **changed}}
    base = {"table": "quality_attempts", "row": f"W{W}", "seed": seed, "device": "h200", "commit": "abc"}
    return {
        **base,
        "config": config,
        "metric": "val_loss",
        "value": value,
        "versions": {},
        "command": "train",
    }


def test_curves_are_of_the_fastest_implementation_as_multiples_of_dense():
    rows = timings(6, "dense[EF,EF]", time_ms=2.0, memory_mb=10.0)
    rows += timings(6, "masked", time_ms=1.0, memory_mb=30.0) + timings(
        6, "gather", time_ms=0.5, memory_mb=20.0
    )
    train = {"direction": "train", "tokens": 4096}
    rows += timings(12, "dense[EF,EF]", **train, time_ms=8.0, memory_mb=40.0, energy_mj=4.0)
    rows += timings(12, "grouped", **train, time_ms=4.0, memory_mb=60.0, energy_mj=1.0)
    curves = granularity.device_curves(rows)
    assert [(one.label, one.x, one.y, one.colour, one.style) for one in curves] == [
        ("use, 1 token", [6], [0.25], 0, "-"),
        ("training step, 4,096 tokens", [12], [0.5], 1, "-"),
        ("training step, 4,096 tokens: memory", [12], [1.5], 1, "--"),
        ("training step, 4,096 tokens: energy", [12], [0.25], 1, ":"),
    ]


def test_losses_are_of_layers_as_large_as_the_timed_that_differ_in_granularity_alone():
    rows = timings(6, "dense[EF,EF]", time_ms=2.0) + timings(6, "gather", time_ms=0.5)
    quality = [loss(6, 4.2), loss(6, 4.4, seed=1), loss(12, 4.5)]
    quality += [loss(1, 4.0, top_k=32), loss(24, 4.1, gate_norm="l2")]  # A = 32; a design of one W
    losses, cpu = granularity.charts(rows, quality)
    [curve] = losses.lines
    assert (curve.label, curve.x, curve.y) == ("tree, gates rms", [6, 12], [pytest.approx(4.3), 4.5])
    assert cpu.title == "cpu, float32"
    [table] = granularity.quality_by_width(rows, quality)
    assert [line[3:] for line in table.cells] == [
        ["6", "16", "`W6`", "4.3000 ± 0.1414", "2"],
        ["12", "8", "`W12`", "4.5000 (one seed)", "1"],
    ]
    [alone] = granularity.charts(rows, [loss(6, 4.2)])
    assert alone.title == "cpu, float32" and granularity.quality_by_width(rows, []) == []


def test_the_picture_is_what_results_give():
    measured, _ = read_rows(f"{ROOT}/results/*.jsonl")
    rows = [row for row in measured if row["table"] == "granularity"]
    charts = granularity.charts(rows, measured)
    points = [
        spoken(chart.title, line.label, *point)
        for chart in charts
        for line in chart.lines
        for point in zip(line.x, line.y)
    ]
    svg = (ROOT / "docs" / "results" / "granularity.svg").read_text()
    assert re.findall("<title>(.*?)</title>", svg) == [granularity.TITLE, *points]
    assert len(tables_of(rows, [])) == len(charts) - 1
