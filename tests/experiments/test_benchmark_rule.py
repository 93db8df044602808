"""The rule of `implementation=None` is within 30 % of the fastest in results/speed_layer.jsonl."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.reporting.record import load_results
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec, rows
from tree_ffn.tree.combine import fastest

combine = importlib.import_module("tree_ffn.tree.combine")  # tree_ffn.tree.combine is the function


@functools.cache
def measured() -> dict[tuple, dict[str, float]]:
    """{(device, kernels, T, E, pass, spec): {implementation: ms}}: few tokens forward, many in training, too.

    Of many tokens without a dense start training alone is looked at, for which the rule is made.
    """
    cases: dict[tuple, dict[str, float]] = {}
    for row in load_results("results/speed_layer.jsonl"):
        config = row["config"]
        if "products" not in config or row["metric"] != "time_ms" or config["direction"] == "start":
            continue
        starts = config["spec"].get("dense_start")
        if not starts and config["direction"] != ("forward" if config["tokens"] <= 256 else "train"):
            continue
        if config["variant"] in IMPLEMENTATIONS:
            sizes = (config["tokens"], config["width"], config["direction"])
            key = (row["device"], config["kernels"], *sizes, json.dumps(config["spec"]))
            cases.setdefault(key, {})[config["variant"]] = row["value"]
    return cases


def spec_of(values: dict) -> LeafSpec | TreeSpec:
    if "shape" not in values:
        return LeafSpec(**values)
    return TreeSpec(**{**values, "shape": TreeShape(**values["shape"])})


def test_both_layers_are_measured_on_a_cpu():
    specs = {type(spec_of(json.loads(spec))) for device, *_, spec in measured() if device == "cpu"}
    assert specs == {LeafSpec, TreeSpec}


@pytest.mark.parametrize("case", sorted(measured()), ids=lambda case: "-".join(map(str, case[:5])))
def test_picks_nearly_the_fastest(case, monkeypatch):
    device, kernels, tokens, width, direction, values = case
    spec, times, on_gpu = spec_of(json.loads(values)), measured()[case], device != "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if on_gpu else "cpu")
    monkeypatch.setattr(rows, "in_place", lambda *dtypes: kernels and not on_gpu)
    monkeypatch.setattr(combine, "by_kernels", lambda *layer: kernels and on_gpu)
    if direction == "train" and isinstance(spec, LeafSpec):
        spec = spec.after_start
    x_TE, params = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16), {"w_in": jnp.zeros((1, 1))}
    assert times[fastest(params, x_TE, spec)] <= 1.3 * min(times.values())


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
