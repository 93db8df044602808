"""Plans: what the compiler says of a step, what is reckoned from it, and what is tried until it fits."""

import importlib.util
import pathlib

import pytest

from experiments.planning import compiled_step
from experiments.planning.chips import CHIPS, SLICES, chip_of, topology
from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tree_ffn.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent
SMOKE = ["--config=configs/smoke.py", "--config.mesh.data=2"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_plan_for_the_devices_at_hand(tmp_path):
    results = tmp_path / "plan.jsonl"
    assert "--row is missing" in call("plan", *SMOKE, f"--results={results}").err
    outcome = call("plan", *SMOKE, f"--results={results}", "--row=tiny")
    assert outcome.code == 0 and "training step for 2 x cpu (data 2, model 1; remat none" in outcome.out
    assert "all-gather" in outcome.out and "GB along data" in outcome.out and "days" not in outcome.out
    rows = {row["metric"]: row for row in load_results(str(results))}
    assert rows.keys() == {
        "argument_gb", "temporary_gb", "peak_gb", "sent_gb", "step_tflop", "executed_tflop", "compile_s",
    }  # fmt: skip
    assert rows["argument_gb"]["value"] > 0 and rows["argument_gb"]["config"]["devices"] == 2
    assert 1 < rows["executed_tflop"]["value"] / rows["step_tflop"]["value"] < 2  # masked computes all units


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "--config is missing"),
        (["--config=configs/smoke.py", "--config.mesh.data=3"], "train.batch_size: 8 is not allowed"),
        (["--config=configs/smoke.py", "--topology=v5e-12"], "--topology: 'v5e-12' is not known; use one of"),
    ],
)
def test_bad_input_is_one_sentence(given, said):
    outcome = call("plan", *given)
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_a_plan_for_tpus_that_are_not_here(tmp_path):
    """By libtpu; where it is missing, the command that installs it is said."""
    command = ["--config=configs/smoke.py", "--config.mesh.data=8", "--topology=v5e-8"]
    if importlib.util.find_spec("libtpu") is None:
        outcome = call("plan", *command)
        assert outcome.code == 2 and "is missing; pip install 'tree_ffn[tpu]'" in outcome.err
        pytest.skip("the rest needs libtpu")
    results = tmp_path / "plan.jsonl"
    outcome = call("plan", *command, f"--results={results}", "--row=tiny")
    assert outcome.code == 0 and "training step for 8 x TPU v5 lite" in outcome.out, outcome.err
    assert "by its compiler" in outcome.out and "chip-hours" in outcome.out
    assert {row["device"] for row in load_results(str(results))} == {"tpu_v5_lite"}
    outcome = call("plan", *command, "--config.train.batch_size=8388608")
    assert outcome.code == 2 and "the step does not fit its devices" in outcome.err, outcome.err
    outcome = call("plan", "--config=configs/smoke.py", "--topology=v5e:3x5")
    assert outcome.code == 2 and "--topology: 'v5e:3x5' is not known to libtpu" in outcome.err


def test_what_fits_first_is_recommended(monkeypatch):
    """The compiler has no small devices here: what does not fit is said for it."""
    tried, compile_step = [], compiled_step.compile_step

    def small_devices(config, devices):
        tried.append((config.model.remat, config.mesh.model))
        if len(tried) < 3:
            raise compiled_step.DoesNotFit("the step does not fit its devices (17 GB of 16 GB).")
        config.mesh.data = 2
        return compile_step(config, devices)

    monkeypatch.setattr(compiled_step, "compile_step", small_devices)
    outcome = call("plan", *SMOKE, "--search")
    assert outcome.code == 0 and tried == [("none", 1), ("dots", 1), ("full", 1)]
    assert "model.remat=dots, mesh.model=1: the step does not fit" in outcome.out
    assert "model.remat=full, mesh.model=1: fits, and is recommended" in outcome.out
    assert "remat full" in outcome.out


def test_times_are_arithmetic():
    figures = {"device": "TPU v5 lite", "devices": 16, "executed_tflop": 3152.0, "sent_gb": 4.5}
    found = compiled_step.reckoned(figures, tokens=1000, steps=8640, cycles=3e9)
    assert found == pytest.approx(
        {
            "compute_s": 2.0, "network_s": 0.1, "step_s": 2.0, "tokens_per_s": 500, "compiler_s": 2.0,
            "days": 0.2, "chip_hours": 76.8,
        }
    )  # fmt: skip
    assert compiled_step.reckoned({**figures, "sent_gb": 450.0}, 1000, 8640, 0)["step_s"] == 10.0
    assert compiled_step.reckoned({**figures, "device": "cpu"}, 1000, 8640, 0) == {}


def test_every_slice_is_of_a_known_chip():
    names = [chip.name for chip in CHIPS]
    assert all(topology(name).split(":")[0] == name.split("-")[0] in names for name in SLICES)
    assert topology("v4:2x2x2") == "v4:2x2x2"
    for kind, name in {"TPU v5 lite": "v5e", "TPU v5": "v5p", "NVIDIA H200": "h200", "cpu": None}.items():
        assert getattr(chip_of(kind), "name", None) == name
    with pytest.raises(InputError, match="use one of v5e-4, "):
        topology("v7-8")
