"""The rule of `implementation=None` is within 30 % of the fastest in results/speed_layer.jsonl."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.reporting.record import load_results
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec, rows
from tree_ffn.tree.combine import fastest


@functools.cache
def measured() -> dict[tuple, dict[str, float]]:
    """{(device, kernels, T, spec): {implementation: ms}}: forward of few tokens, training of many."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in load_results("results/speed_layer.jsonl"):
        config = row["config"]
        if "products" not in config or row["metric"] != "time_ms":
            continue
        forward = config["tokens"] <= 256 or config["spec"].get("dense_start")  # which masked alone trains
        if config["direction"] != ("forward" if forward else "train"):
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
    monkeypatch.setattr(rows, "in_place", lambda *dtypes: kernels)
    x_TE, params = jnp.zeros((tokens, 1)), {"w_in": jnp.zeros((1, 1))}
    assert times[fastest(params, x_TE, spec_of(json.loads(spec)))] <= 1.3 * min(times.values())


@pytest.mark.parametrize("spec", [
    TreeSpec(TreeShape(1, 7, 12), routing="straight_through"),
    LeafSpec(n_experts=512, expert_width=6, top_k=16, dense_start=0.2),
])  # fmt: skip
def test_what_masked_alone_trains_is_masked_for_many_tokens(spec, monkeypatch):
    monkeypatch.setattr(rows, "in_place", lambda *dtypes: True)
    found = {n: fastest({"w_in": jnp.zeros((1, 1))}, jnp.zeros((n, 1)), spec) for n in (1, 257, 8192)}
    assert found == {1: "gather", 257: "masked", 8192: "masked"}


def test_a_gpu_gathers_up_to_16_tokens(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    spec, params = TreeSpec(TreeShape(1, 7, 12)), {"w_in": jnp.zeros((1, 1))}
    found = [fastest(params, jnp.zeros((n, 1)), spec) for n in (1, 16, 17, 8192)]
    assert found == ["gather", "gather", "masked", "masked"]
