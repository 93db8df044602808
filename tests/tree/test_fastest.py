"""What a layer takes where no implementation is named was nowhere much slower than the best one timed."""

import dataclasses
import json
import pathlib

import jax
import pytest

from experiments.reporting.record import load_results
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec
from tree_ffn.tree.combine import fastest_on
from tree_ffn.tree.kernels import experts

RESULTS = pathlib.Path(__file__).parents[2] / "results" / "speed_layer.jsonl"
FIELDS = {field.name for field in dataclasses.fields(LeafSpec)}


def timed_cases():
    """{case: {implementation: milliseconds}} of leaf layers, where one run timed two of them or more."""
    cases = {}
    for row in load_results(str(RESULTS)):
        config = dict(row["config"])
        variant = config.pop("variant", None)
        if row["metric"] == "time_ms" and variant in IMPLEMENTATIONS and "n_experts" in config["spec"]:
            case = json.dumps(config | {"device": row["device"]}, sort_keys=True)
            cases.setdefault(case, {})[variant] = row["value"]
    return {case: times for case, times in cases.items() if len(times) > 1}


CASES = timed_cases()


def chosen(case: dict) -> str:
    """By its device and sizes; neither has to be here."""
    spec = LeafSpec(**{name: value for name, value in case["spec"].items() if name in FIELDS})
    if case["direction"] == "start":
        return "masked"
    spec = spec.after_start if case["direction"] == "train" else spec
    compiled, x_TE = case.get("kernels", False), (case["tokens"], case["width"])
    if case["device"] == "cpu":
        return fastest_on("cpu", compiled, *x_TE, spec)
    units = (spec.n_experts, spec.expert_width, case["width"])
    compiled &= experts.fit(jax.ShapeDtypeStruct(x_TE, case["dtype"]), spec.top_k, units)
    return fastest_on("gpu", compiled, *x_TE, spec)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_implementation_that_is_taken_is_the_fastest_or_near_it(case):
    times = CASES[case]
    assert times[chosen(json.loads(case))] <= 1.1 * min(times.values()), times


def test_rows_are_of_both_devices_and_of_every_choice():
    cases = list(map(json.loads, CASES))
    assert {case["device"] for case in cases} >= {"cpu", "h200"}
    assert set(map(chosen, cases)) == set(IMPLEMENTATIONS)
