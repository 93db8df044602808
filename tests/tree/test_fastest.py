"""What a layer takes where no implementation is named was nowhere much slower than the best one timed."""

import dataclasses
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments.reporting.record import load_results
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec
from tree_ffn.tree.combine import combine, fastest_on
from tree_ffn.tree.kernels import experts
from tree_ffn.tree.leaf.layer import init_params
from tree_ffn.tree.leaf.route import route

combining = importlib.import_module("tree_ffn.tree.combine")  # tree_ffn.tree.combine is the function
RESULTS = pathlib.Path(__file__).parents[2] / "results" / "speed_layer.jsonl"


def timed_cases():
    """{case: {implementation: milliseconds}} where one run timed two of them or more."""
    cases = {}
    for row in load_results(str(RESULTS)):
        config = dict(row["config"])
        variant = config.pop("variant", None)
        if row["metric"] == "time_ms" and variant in IMPLEMENTATIONS:
            case = json.dumps(config | {"device": row["device"]}, sort_keys=True)
            cases.setdefault(case, {})[variant] = row["value"]
    return {case: times for case, times in cases.items() if len(times) > 1}


CASES = timed_cases()


def spec_of(values: dict) -> LeafSpec | TreeSpec:
    if "shape" in values:
        values, kind = {**values, "shape": TreeShape(**values["shape"])}, TreeSpec
    else:
        kind = LeafSpec
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in fields})


def chosen(case: dict) -> str:
    """By its device and sizes; neither has to be here."""
    if case["direction"] == "start":
        return "masked"
    spec, learns = spec_of(case["spec"]), case["direction"] == "train"
    of_leaves = isinstance(spec, LeafSpec)
    spec = spec.after_start if learns and of_leaves else spec
    compiled, x_TE = case.get("kernels", False), (case["tokens"], case["width"])
    if case["device"] == "cpu":
        return fastest_on("cpu", compiled, *x_TE, spec, learns)
    if of_leaves:
        units = (spec.n_experts, spec.expert_width, case["width"])
        compiled &= experts.fit(jax.ShapeDtypeStruct(x_TE, case["dtype"]), spec.top_k, units)
    return fastest_on("gpu", compiled, *x_TE, spec, learns)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_implementation_that_is_taken_is_the_fastest_or_near_it(case):
    times = CASES[case]
    assert times[chosen(json.loads(case))] <= 1.1 * min(times.values()), times


def test_rows_are_of_both_devices_and_layers_and_of_every_choice():
    cases = list(map(json.loads, CASES))
    assert {case["device"] for case in cases} >= {"cpu", "h200"}
    assert {type(spec_of(case["spec"])) for case in cases} == {LeafSpec, TreeSpec}
    assert set(map(chosen, cases)) == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("spec", [
    TreeSpec(TreeShape(1, 7, 12), routing="straight_through"),
    LeafSpec(n_experts=512, expert_width=6, top_k=16, dense_start=0.2),
])  # fmt: skip
def test_what_masked_alone_trains_is_masked_for_many_tokens(spec):
    assert [fastest_on("cpu", True, n, 768, spec) for n in (1, 257, 8192)] == ["gather", "masked", "masked"]


def test_derivatives_are_those_of_the_implementation_that_learns_fastest(monkeypatch):
    spec = LeafSpec(n_experts=32, expert_width=2, top_k=2)
    params = init_params(jax.random.key(0), spec, width=8)
    x_TE = jax.random.normal(jax.random.key(1), (40, 8))
    ids_TK, gates_TK = route(params, x_TE, spec)
    monkeypatch.setattr(combining, "fastest_on", lambda *at: "masked" if at[-1] else "gather")

    def out(implementation):
        return lambda params, x_TE, g_TK: combine(params, x_TE, ids_TK, g_TK, spec, implementation)

    layer, by_rule, masked = (params, x_TE, gates_TK), out(None), out("masked")
    alike = jax.tree.map(jnp.array_equal, gradient(by_rule, layer), gradient(masked, layer))
    assert jax.tree.all(alike)
    assert jnp.array_equal(jax.jvp(by_rule, layer, layer)[1], jax.jvp(masked, layer, layer)[1])
    assert jnp.allclose(by_rule(*layer), masked(*layer), atol=1e-6)
    assert not jnp.array_equal(by_rule(*layer), masked(*layer))  # gather adds in another order


def gradient(out, layer):
    return jax.grad(lambda *layer: out(*layer).sum(), (0, 1, 2))(*layer)
