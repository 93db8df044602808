"""Plans: what the compiler says of a step, what is reckoned from it, and what is tried until it fits."""

import collections
import html
import importlib.util
import math
import pathlib
import re

import pytest

from experiments.planning import choices, compiled_step, page
from experiments.planning.chips import CHIPS, SLICES, chip_of, slice_of
from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tree_ffn.config import make_config
from tree_ffn.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent
SMOKE = ["--config=configs/smoke.py", "--config.mesh.data=2"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_plan_for_the_devices_at_hand(tmp_path):
    results = tmp_path / "plan.jsonl"
    command = [*SMOKE, f"--results={results}", "--row=tiny", "--tokens=1e6"]
    assert "--row is missing" in call("plan", *SMOKE, f"--results={results}").err
    outcome = call("plan", *command)
    assert outcome.code == 0 and "Training step for 2 x cpu\ndata 2, model 1; remat none" in outcome.out
    assert "all-gather" in outcome.out and "Memory of a device" in outcome.out and "days" in outcome.out
    rows = {row["metric"]: row for row in load_results(str(results))}
    assert rows.keys() == {
        "weights_gb", "moments_gb", "argument_gb", "temporary_gb", "peak_gb", "sent_gb", "step_tflop",
        "executed_tflop", "compile_s",
    }  # fmt: skip
    value = {metric: row["value"] for metric, row in rows.items()}
    assert value["moments_gb"] == pytest.approx(2 * value["weights_gb"], rel=0.01)
    assert 0 < value["weights_gb"] + value["moments_gb"] < value["argument_gb"]
    assert 1 < value["executed_tflop"] / value["step_tflop"] < 2  # masked computes all units
    assert rows["sent_gb"]["config"]["plan"] == {"slice": "", "devices": 2, "tokens": 1e6}
    written = results.read_text()
    assert "has tiny for the devices at hand" in call("plan", *command).out  # a loop goes on where it stopped
    assert results.read_text() == written


def test_the_page_says_what_the_terminal_says(tmp_path):
    """Word for word, in one file that loads nothing; what else stands there is not written over."""
    path = tmp_path / "plan.html"
    outcome = call("plan", *SMOKE, "--search", f"--html={path}")
    assert outcome.code == 0, outcome.err
    text = path.read_text()
    assert "<script" not in text and "http" not in text and 'content="width=device-width' in text
    shown = html.unescape(re.sub(r"<(style|title|pre)>.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL))
    said = collections.Counter(re.sub(r"^  - ", "", outcome.out, flags=re.MULTILINE).split())
    assert collections.Counter(shown.split()) == said and said["temporaries"] == 1
    path.write_text("mine")
    outcome = call("plan", *SMOKE, f"--html={path}")
    assert outcome.code == 2 and "--html: " in outcome.err and "is no report" in outcome.err


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "--config is missing"),
        (["--config=configs/smoke.py", "--config.mesh.data=3"], "train.batch_size: 8 is not allowed"),
        (["--config=configs/smoke.py", "--topology=v5e-12"], "'v5e-12' is not known; use one of v5e-4, "),
        (["--config=configs/smoke.py", "--tokens=-1"], "--tokens=-1"),
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
    assert outcome.code == 0 and "Training step for 8 x TPU v5 lite" in outcome.out, outcome.err
    assert "by the compiler's cycles" in outcome.out and "chip-hours" in outcome.out
    assert {row["device"] for row in load_results(str(results))} == {"tpu_v5_lite"}
    outcome = call("plan", *command, "--config.train.batch_size=8388608")
    assert outcome.code == 2 and "the step does not fit its devices" in outcome.err, outcome.err


def test_a_plan_for_gpus_that_are_not_here():
    """By JAX's plugin for CUDA; where it is missing, the command that installs it is said."""
    outcome = call("plan", "--config=configs/smoke.py", "--config.mesh.data=8", "--topology=h200-8")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        assert outcome.code == 2 and "is missing; pip install 'tree_ffn[cuda]'" in outcome.err
        pytest.skip("the rest needs JAX's plugin for CUDA")
    assert outcome.code == 0 and "Training step for 8 x NVIDIA H200" in outcome.out, outcome.err
    assert "of 141 GB a device" in outcome.out and "reduce-scatter" in outcome.out


def test_what_fits_first_is_recommended(monkeypatch):
    """The compiler has no small devices here: what does not fit is said for it."""
    tried, compile_step = [], compiled_step.compile_step

    def small_devices(config, devices):
        train = config.train
        tried.append((config.model.remat, train.grad_accum_steps, train.grad_sync, config.mesh.model))
        if len(tried) < 4:
            raise compiled_step.DoesNotFit("the step does not fit its devices (17G of 16G).")
        return compile_step(config, devices)

    monkeypatch.setattr(choices, "compile_step", small_devices)
    outcome = call("plan", *SMOKE, "--search", "--config.train.batch_size=16")
    assert outcome.code == 0, outcome.err
    ways = [("none", 1), ("dots", 1), ("full", 1), ("none", 2)]
    assert tried == [(*way, "step", 1) for way in ways]
    assert "remat dots, 1 microbatches, grad_sync step, model 1: the step does not fit" in outcome.out
    assert "17 of 16 GiB" in outcome.out and "GB fits" in outcome.out


def test_what_sends_more_is_tried_after_what_recomputes_more():
    config = make_config({"train.batch_size": 16, "train.grad_accum_steps": 2})
    remats = ("none", "dots", "full")
    of_two = [(remat, 2, 1, sync) for sync in ("step", "microbatch") for remat in remats]
    assert [one[:4] for one in choices.choices(config, 8)] == [*of_two, ("full", 2, 8, "microbatch")]
    of_one = [one[:4] for one in choices.choices(config, 1)]
    assert of_one == [(remat, n, 1, "step") for n in (2, 16) for remat in remats]


def test_times_are_arithmetic():
    figures = {
        "device": "TPU v5 lite", "devices": 16, "executed_tflop": 3152.0, "sent_gb": 4.5, "tokens": 1000,
        "compiler_cycles": 3e9,
    }  # fmt: skip
    found = compiled_step.reckoned(figures)
    assert found == pytest.approx(
        {"compute_s": 2.0, "network_s": 0.1, "step_s": 2.0, "tokens_per_s": 500, "compiler_s": 2.0}
    )
    run = compiled_step.run_of(figures | found, tokens=8_640_000)
    assert run == pytest.approx({"days": 0.2, "chip_hours": 76.8})
    memory = {"argument_gb": 2.0, "temporary_gb": 2.0, "peak_gb": 3.0}
    said = page.summary(figures | found | memory | {"compiler_s": 5.0}, 1e9)
    assert said == (
        "It fits, its compiler says: 3.00 of 16.9 GB a device. 1.0 G tokens take 23.15 days, 8,889 chip-"
        "hours, limited by computing; 2.5 times as long by the compiler's cycles."
    )
    assert compiled_step.reckoned({**figures, "sent_gb": 450.0})["step_s"] == 10.0
    assert compiled_step.reckoned({**figures, "device": "cpu"}) == compiled_step.run_of(figures, 1e9) == {}


def test_every_slice_is_of_a_known_chip():
    chips = {chip.name: chip for chip in CHIPS}
    for name, one in SLICES.items():
        assert name.split("-")[0] == one.chip in chips and one.chips % one.hosts == 0
        if one.topology:
            chip, _, shape = one.topology.partition(":")
            assert chip == one.chip and math.prod(map(int, shape.split("x"))) == one.chips
    for kind, name in {"TPU v5 lite": "v5e", "TPU v5": "v5p", "NVIDIA H200": "h200", "cpu": None}.items():
        assert getattr(chip_of(kind), "name", None) == name
    with pytest.raises(InputError, match="use one of v5e-4, "):
        slice_of("v7-8")
