"""The rule of `implementation=None` is within 30 % of the fastest in results/speed_layer.jsonl."""

import pytest

from experiments.record import load_results
from experiments.speed_tables import EXECUTIONS, speed_name
from tree_ffn.tree import TreeShape, TreeSpec, pick_implementation


def measured():
    """{(backend, device, E, T, P, W): {execution: ms}}: forward of few tokens, training of many."""
    cases: dict[tuple, dict] = {}
    for row in load_results("results/speed_layer.jsonl"):
        width, tokens, trees, node, direction, variant = speed_name(row)
        wanted = "forward" if tokens <= 16 else "train"
        if row["metric"] == "time_ms" and direction == wanted and variant in EXECUTIONS and node.isdecimal():
            backend = "cpu" if row["device"] == "cpu" else "gpu"
            key = (backend, row["device"], width, tokens, trees, int(node))
            cases.setdefault(key, {})[variant] = row["value"]
    return {key: times for key, times in cases.items() if len(times) > 1}


@pytest.mark.parametrize("case", sorted(measured()), ids=lambda case: "-".join(map(str, case)))
def test_picks_nearly_the_fastest(case):
    backend, _, _, tokens, trees, node = case
    times = measured()[case]
    spec = TreeSpec(TreeShape(trees, 7, node), routing="continuous")
    assert times[pick_implementation(spec, tokens, backend)] <= 1.3 * min(times.values())
