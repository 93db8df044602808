"""Speed of other people's layers: a checkout of a stand-in is timed, what is wrong is refused."""

import importlib.util

import pytest

from experiments.reporting.record import load_results
from tests.experiments.programs import call

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
LAYERS = """
import torch

class FFF(torch.nn.Module):
    def __init__(self, input_width, output_width, depth):
        super().__init__()
        self.path = torch.nn.Linear(input_width, depth + 1)
        self.out = torch.nn.Linear(depth + 1, output_width)

    def forward(self, x):
        return self.out(self.path(x))[:, None]

class FFF_Sparse(FFF):
    pass
"""


@needs_torch
def test_layers_of_a_checkout_are_timed_beside_dense_ones(tmp_path):
    (tmp_path / "benchmark_pytorch").mkdir()
    (tmp_path / "benchmark_pytorch" / "fff.py").write_text(LAYERS)
    sizes = ["--width=128", "--depth=3", "--tokens=2", "--seconds=0"]
    outcome = call("benchmark_peers", f"--ultrafastbert={tmp_path}", *sizes, f"--results={tmp_path}/r.jsonl")
    assert outcome.code == 0, outcome.err
    rows = load_results(f"{tmp_path}/r.jsonl")
    names = [f"d128_T2_ultrafastbert_{name}" for name in ("FFF", "FFF_Sparse", "ours")]
    assert list(dict.fromkeys(row["row"] for row in rows)) == names
    values = {row["metric"]: row["value"] for row in rows if row["row"] == names[0]}
    assert values["ratio_to_dense"] == pytest.approx(values["dense_ms"] / values["time_ms"])
    assert {row["config"]["units"] for row in rows} == {15}
    shown = call("tables", f"--results={tmp_path}/r.jsonl")
    assert shown.code == 0 and "| ultrafastbert, `FFF` | 128 | 2 |" in shown.out, shown.err


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
