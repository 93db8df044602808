"""From a trained dense run, or an export, to runs of trees that the other programs read."""

import re

import pytest

from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.models import DenseSpec, export
from tree_ffn.models.cost import describe
from tree_ffn.training.checkpoint import restore_for_inference
from tree_ffn.training.loop import train
from tree_ffn.tree import TreeSpec

ASKED = ("--n_trees=2", "--depth=2", "--tokens=512", "--held_out=256", "--batch_size=8", "--batches=2")


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    train(tiny_config(texts, kind="dense", ffn__width=14), str(workdir), log=lambda _: None, bar=False)
    return workdir


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    """A run of trees, the results rows and what the program said."""
    to = tmp_path_factory.mktemp("converted")
    outcome = call(
        "convert", f"--workdir={run}", *ASKED, "--method=cluster", "--methods=random,frequency",
        f"--to={to}/new", f"--results={to}/rows.jsonl",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return to, outcome.out


def test_the_table_and_its_rows(converted):
    to, out = converted
    assert "512 calibration tokens of " in out
    assert "trees: 6 of 14 units active (42.86 %), with routers 57.14 % of" in out
    lines = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if re.search(r"\d\.\d{3} +-?\d", line)
    }
    assert {"random", "frequency", "cluster", "oracle", "static"} <= lines.keys()
    assert float(lines["cluster/paths"][0]) >= float(lines["cluster"][0]) > float(lines["random"][0]) - 0.1
    rows = record.load_results(f"{to}/rows.jsonl")
    assert {row["row"] for row in rows} == {
        f"{method}_separate_refits3" for method in ("random", "frequency", "cluster")
    }
    assert {row["table"] for row in rows} == {"conversion"}
    page = render(f"{to}/rows.jsonl")
    assert "## Conversion" in page and "| `cluster_separate_refits3` | 42.9% | 57.1% |" in page
    losses, shares = {"val_loss", "loss_rise"}, {"active_share", "flops_share"}
    kept = {"kept", "kept_paths", "kept_oracle", "kept_static"}
    assert {row["metric"] for row in rows} == losses | shares | kept


def test_what_is_written_is_a_run(converted, tmp_path):
    to, _ = converted
    found = restore_for_inference(f"{to}/new", 0)
    assert all(isinstance(ffn, TreeSpec) and ffn.router == "frozen" for ffn in found.model.ffns)
    assert found.meta["converted"]["method"] == "cluster" and found.meta["converted"]["tokens"] == 512
    assert "frozen separate routers, whose 4 products a token" in describe(found.model)[0]
    assert call("evaluate", f"--workdir={to}/new", "--batch_size=8").code == 0
    assert call("export", f"--workdir={to}/new", f"--to={tmp_path}/out").code == 0
    asked = ("--prompt=a b", "--tokens=8", "--seed=1")
    texts = [
        call("generate", source, *asked) for source in (f"--workdir={to}/new", f"--export={tmp_path}/out")
    ]
    assert texts[0].code == 0 and texts[0].out == texts[1].out


def test_an_export_with_text_named(texts, run, tmp_path):
    assert call("export", f"--workdir={run}", f"--to={tmp_path}/dense").code == 0
    outcome = call(
        "convert", f"--export={tmp_path}/dense", f"--files={texts}/*.txt", f"--cache_dir={tmp_path}/cache",
        *ASKED, "--depth=3", "--router=spent", "--method=frequency", f"--to={tmp_path}/new",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = restore_for_inference(f"{tmp_path}/new")
    ffn = found.model.ffns[0]
    assert isinstance(ffn, TreeSpec)
    assert ffn.routing == "straight_through" and ffn.shape.depth == 3
    assert isinstance(export.load(f"{tmp_path}/dense")[0].ffns[0], DenseSpec)
    assert call("evaluate", f"--workdir={tmp_path}/new", "--batch_size=8").code == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workdir="], "--workdir or --export: give one of them"),
        (["--export=x"], "--workdir or --export: give one of them"),
        (["--to=x"], "--method is missing"),
        (["--method=random"], "--to is missing"),
        (["--methods=random,best"], "--method: 'best' is not known; use one of: random, frequency, cluster"),
        (["--router=none"], "--router: 'none' is not known; use one of: separate, spent"),
        (["--method=random", "--to={run}"], "is there already; name a new directory"),
        (["--node_width=a"], "--node_width: 'a' is not allowed"),
        (["--node_width=1,2"], "node_width: (1, 2) has 2 widths"),
        (["--n_trees=0"], "n_trees: 0 is not allowed"),
        (["--max_share=0.05"], "--max_share: 0.05 is not reached by this shape, of whose 14 units 6 work"),
        (["--n_trees=1"], "have room for 7 units, and the dense layer has 14"),
        (["--router=spent"], "have room for 8 units (6 of its units are spent on routers)"),
        (["--depth=5"], "--tokens: 512 is not allowed; depth 5 takes at least 1,024 (32 * 2^5)"),
        (["--tokens=9000000"], "and 9,000,000 are needed; use more text"),
        (["--refits=-1"], "--refits: -1 is not allowed"),
        (["--held_out=0"], "--held_out: 0 is not allowed"),
        (["--files={tmp}/none.txt"], "none.txt"),
        (["--step=5"], "step: 5 has no checkpoint"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "tmp": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    outcome = call("convert", f"--workdir={run}", *ASKED, *given)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert not (tmp_path / "x").exists()


def test_trees_are_not_dense(converted):
    outcome = call("convert", f"--workdir={converted[0]}/new", *ASKED)
    assert outcome.code == 2 and "layer 0 is not dense (ffn.kind 'tree')" in outcome.err
