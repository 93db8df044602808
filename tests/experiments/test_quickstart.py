"""What `make quickstart` runs, with a tiny config; the real one is slow."""

import importlib
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from experiments.reporting.record import load_results
from tests.experiments.programs import alone, call

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """stdout of a tiny run of all kinds, and its results file."""
    place = tmp_path_factory.mktemp("quickstart")
    files = [f"--workdir={place}", f"--results={place}/rows.jsonl"]
    outcome = call("quickstart", "--config=smoke", "--steps=4", "--seeds=0,1", *files)
    assert outcome.code == 0, outcome.err
    return outcome.out, place


def test_one_table_of_all_kinds_and_a_plain_verdict(output):
    text, _ = output
    table = text[text.index("bits per byte") :]
    for name, units, products in (
        ("dense", "16 of 16", r"32 \(12\.5 %\)"),
        ("narrow", "6 of 6", r"12 \(4\.7 %\)"),
        ("recommended", "6 of 16", r"17 \(6\.6 %\)"),  # 6 units twice, and 5 routers
    ):
        row = rf"^{name} +\d\.\d{{4}} \+- \S+ +{units} +{products} +[\d,]+ +\d+$"
        assert re.search(row, table, re.M), name
    assert len(re.findall(r"^recommended (ended BELOW|ended below|did NOT end below)", table, re.M)) == 1


def test_the_losses_are_drawn(output):
    text, place = output
    assert f"The loss curves are drawn in {place / 'losses.svg'}." in text
    picture = xml.etree.ElementTree.parse(place / "losses.svg").getroot()
    named = "".join(picture.itertext())
    assert picture.tag.endswith("svg") and all(name in named for name in ("dense", "narrow", "recommended"))


def test_a_sample_and_the_next_commands_follow(output):
    text, place = output
    sample, commands = text.split("Sample 1: ")[1].split("Next:")
    assert sample.startswith("def read(self, ") and "Sample 2: def read(self, " in sample
    assert len(re.findall(r"python\S* -m experiments\.\w+ --", commands)) == 3
    assert str(place / "leaf_seed0_steps4") in commands


def test_figures_become_rows(output):
    _, place = output
    rows = load_results(str(place / "rows.jsonl"))
    for kind in ("recipe", "narrow", "dense"):
        assert sum((row["row"], row["metric"]) == (kind, "bits_per_byte") for row in rows) == 2
    assert {row["value"] for row in rows if (row["row"], row["metric"]) == ("recipe", "products")} == {17}


def test_the_verdict_is_honest():
    runs = lambda *values: [{"bits_per_byte": value} for value in values]
    with alone("quickstart"):
        verdict = importlib.import_module("experiments.quickstart").verdict
    below = verdict({"leaf": runs(2.4), "narrow": runs(2.5)})
    above = verdict({"leaf": runs(2.5), "narrow": runs(2.4)})
    mixed = verdict({"leaf": runs(2.4, 2.6), "narrow": runs(2.5, 2.5)})
    assert below == "recommended ended BELOW narrow by 0.1000 bits per byte, 4.0 %"
    assert above == "recommended did NOT end below narrow: it is 0.1000 bits per byte above"
    assert mixed.startswith("recommended ended below narrow in some seeds only")


@pytest.mark.parametrize("flag,said", [("--seeds=a", "--seeds: 'a'"), ("--steps=0", "--steps: 0")])
def test_bad_flags_get_one_sentence(flag, said):
    outcome = call("quickstart", flag)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.slow
def test_the_real_run_ends_below_narrow(tmp_path):
    """As `make quickstart` starts it."""
    words = [sys.executable, "-m", "experiments.quickstart", f"--workdir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recommended ended BELOW narrow" in done.stdout
