"""Speed of other people's layers: a checkout of a stand-in is timed, what is wrong is refused."""

import importlib.util
import sys

import pytest

from experiments.reporting.record import load_results
from tests.experiments.programs import call

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
SIZES = ["--width=128", "--depth=3", "--tokens=2", "--seconds=0"]
LAYERS = """
import torch

class FFF(torch.nn.Module):
    def __init__(self, input_width, output_width, depth):
        super().__init__()
        self.depth = depth
        self.w1s, self.w2s = (torch.nn.Parameter(torch.randn(2 ** (depth + 1) - 1, n) / n ** 0.5)
                              for n in (input_width, output_width))

    def forward(self, x):
        node, out = torch.zeros(len(x), dtype=torch.long), 0
        for _ in range(self.depth + 1):
            logit = (x * self.w1s[node]).sum(1)
            out = out + torch.nn.functional.gelu(logit)[:, None] * self.w2s[node]
            node = 2 * node + 1 + SIDE
        return out[:, None]
"""


def checkout(place, side):
    (place / "benchmark_pytorch").mkdir()
    (place / "benchmark_pytorch" / "fff.py").write_text(LAYERS.replace("SIDE", side))
    sys.modules.pop("fff", None)
    return f"--ultrafastbert={place}"


@needs_torch
def test_layers_of_a_checkout_are_timed_beside_dense_ones(tmp_path):
    arguments = [checkout(tmp_path, "(logit >= 0)"), *SIZES, f"--results={tmp_path}/r.jsonl"]
    outcome = call("benchmark_peers", *arguments)
    assert outcome.code == 0, outcome.err
    rows = load_results(f"{tmp_path}/r.jsonl")
    names = [f"d128_T2_ultrafastbert_{name}" for name in ("FFF", "ours")]
    assert list(dict.fromkeys(row["row"] for row in rows)) == names
    values = {row["metric"]: row["value"] for row in rows if row["row"] == names[0]}
    assert values["ratio_to_dense"] == pytest.approx(values["dense_ms"] / values["time_ms"])
    assert {row["config"]["units"] for row in rows} == {15}
    shown = call("tables", f"--results={tmp_path}/r.jsonl")
    assert shown.code == 0 and "| ultrafastbert, `FFF` | 128 | 2 |" in shown.out, shown.err


@needs_torch
def test_a_layer_that_computes_something_else_is_not_timed(tmp_path):
    with pytest.raises(RuntimeError, match="FFF differs from our path layer"):
        call("benchmark_peers", checkout(tmp_path, "(logit < 0)"), *SIZES)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--ultrafastbert and --peer are missing"),
        (["--peer=nowhere"], "--peer: 'nowhere' is no checkout of that repository"),
        (["--peer=.", "--width=100"], "--width: 100 is not allowed"),
        (["--peer=.", "--depth=0"], "--depth: 0 is not allowed"),
        (["--peer=.", "--tokens=0"], "--tokens: '0' is not allowed"),
        (["--peer=."], "--peer: PEER_pytorch.PEER cannot be imported"),
    ],
)
def test_wrong_input(arguments, said):
    outcome = call("benchmark_peers", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
