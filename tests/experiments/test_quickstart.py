"""What `make quickstart` runs, with a tiny config; the real one is slow."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import quickstart
from tests.experiments.programs import alone, call

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(*words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """stdout of a tiny run of both kinds, and its results file."""
    place = tmp_path_factory.mktemp("quickstart")
    done = run(
        "-m", "experiments.quickstart", "--config=smoke", "--steps=4", "--seeds=0,1", f"--workdir={place}",
        f"--results={place}/rows.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, place


def test_one_table_with_both_kinds_and_a_plain_verdict(output):
    text, _ = output
    table = text[text.index("bits per byte") :]
    assert re.search(r"^tree_continuous_P2_W1 +\d\.\d{4} \+- \S+ +8 of 30 \(26\.7 %\) +[\d,]+ ", table, re.M)
    assert re.search(r"^tree_continuous.* \d+ grouped, \d+ masked$", table, re.M)
    assert re.search(r"^narrow_A8 +\d\.\d{4} \+- \S+ +8 of 8 ", table, re.M)
    assert len(re.findall(r"^tree (ended BELOW|ended below|did NOT end below)", table, re.M)) == 1


def test_a_sample_and_the_next_commands_follow(output):
    text, place = output
    sample, commands = text.split("Sample 1: ")[1].split("Next:")
    assert sample.startswith("def read(self, ") and "Sample 2: def read(self, " in sample
    assert len(re.findall(r"python\S* -m experiments\.\w+ --", commands)) == 3
    assert str(place / "tree_seed0_steps4") in commands


def test_figures_become_rows(output):
    _, place = output
    rows = (place / "rows.jsonl").read_text().splitlines()
    for kind in ("tree_continuous_P2_W1", "narrow_A8"):
        assert sum(f'"row": "{kind}", "metric": "bits_per_byte"' in row for row in rows) == 2
    assert sum('"metric": "time_ms"' in row for row in rows) == 2


@pytest.mark.parametrize(
    "layer,name,grouped",
    [
        ("experts", "tree_continuous_P16_D5_experts_norm2_beam2_leak100_20", ("continuous", 0.0)),
        ("paths", "tree_straight_P2_W1_leak100_20", ("hard", 0.0)),
    ],
)
def test_a_layer_that_grouped_cannot_train_is_timed_by_it_and_trained_by_masked(layer, name, grouped):
    config = quickstart.get_config(f"layer={layer}")
    with alone("quickstart"):
        program = importlib.import_module("experiments.quickstart")
    assert program.row_name("tree", config) == name
    timed = {execution: program.executed_by(config, execution) for execution in program.TIMED}
    assert (timed["grouped"].ffn.routing, timed["grouped"].ffn.leak) == grouped
    assert not program.trains_as(timed["grouped"], config) and program.trains_as(timed["masked"], config)


def test_the_verdict_is_honest():
    runs = lambda *values: [{"bits_per_byte": value} for value in values]
    with alone("quickstart"):
        verdict = importlib.import_module("experiments.quickstart").verdict
    below = verdict({"tree": runs(2.4), "narrow": runs(2.5)})
    above = verdict({"tree": runs(2.5), "narrow": runs(2.4)})
    mixed = verdict({"tree": runs(2.4, 2.6), "narrow": runs(2.5, 2.5)})
    assert below == "tree ended BELOW narrow by 0.1000 bits per byte, 4.0 %"
    assert above == "tree did NOT end below narrow: it is 0.1000 bits per byte above"
    assert mixed.startswith("tree ended below narrow in some seeds only")


@pytest.mark.parametrize("flag,said", [("--seeds=a", "--seeds: 'a'"), ("--steps=0", "--steps: 0")])
def test_bad_flags_get_one_sentence(flag, said):
    outcome = call("quickstart", flag)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.slow
def test_the_real_run_ends_below_narrow(tmp_path):
    done = run("-m", "experiments.quickstart", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "tree ended BELOW narrow" in done.stdout
