"""The rule of `implementation=None` is within 30 % of the fastest in results/speed_layer.jsonl."""

import json

import jax
import pytest

from experiments.record import load_results
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec
from tree_ffn.tree.combine import fastest


def measured() -> dict[tuple, dict[str, float]]:
    """{(device, kernels, T, spec): {implementation: ms}}: forward of few tokens, training of many."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in load_results("results/speed_layer.jsonl"):
        config = row["config"]
        wanted = "forward" if config.get("tokens", 0) < 256 else "train"
        if "products" not in config or row["metric"] != "time_ms" or config["direction"] != wanted:
            continue
        if config["variant"] in IMPLEMENTATIONS:
            key = (row["device"], config["kernels"], config["tokens"], json.dumps(config["spec"]))
            cases.setdefault(key, {})[config["variant"]] = row["value"]
    return cases


def spec_of(values: dict) -> LeafSpec | TreeSpec:
    if "shape" not in values:
        return LeafSpec(**values)
    return TreeSpec(**{**values, "shape": TreeShape(**values["shape"])})


def test_both_layers_are_measured_on_a_cpu():
    specs = {type(spec_of(json.loads(spec))) for device, _, _, spec in measured() if device == "cpu"}
    assert specs == {LeafSpec, TreeSpec}


@pytest.mark.parametrize("case", sorted(measured()), ids=lambda case: f"{case[0]}-{case[1]}-T{case[2]}")
def test_picks_nearly_the_fastest(case, monkeypatch):
    device, kernels, tokens, spec = case
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if device == "cpu" else "gpu")
    times = measured()[case]
    assert times[fastest(tokens, spec_of(json.loads(spec)))] <= 1.3 * min(times.values())
