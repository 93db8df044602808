"""From a trained run to a curve of pruned ones, and to a run, an export and text of one of them."""

import math
import shutil

import pytest

from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.models import export, total_units
from tree_ffn.models.cost import describe, sizes
from tree_ffn.models.dense import DenseSpec
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.tree import PrunedSpec

NEW = {"train__steps": 4, "optim__lr": 1e-4, "train__checkpoint_every": 2}


def config_of(texts, **changes):
    """Trees of 4 leaves: 4,000 calibration tokens judge them."""
    return tiny_config(texts, kind="tree", **({"ffn__depth": 2, "ffn__routing": "hard"} | changes))


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config_of(texts), str(workdir), log=lambda _: None, bar=False)
    return workdir


@pytest.fixture(scope="module")
def pruned(run, tmp_path_factory):
    """A new run pruned to one path a tree, and what the program said."""
    to = tmp_path_factory.mktemp("pruned") / "new"
    outcome = call("prune", f"--workdir={run}", "--threshold=1", f"--to={to}", "--batch_size=8")
    assert outcome.code == 0, outcome.err
    return to, outcome.out


def lines_of(out):
    """{threshold: cells} of the printed curve."""
    text = out.split("units of every layer\n")[1].split("\n\n")[0]
    return {line.split()[0]: line.split() for line in text.splitlines()}


def test_the_curve_and_its_rows(run, tmp_path):
    results = tmp_path / "rows.jsonl"
    outcome = call(
        "prune", f"--workdir={run}", "--thresholds=0,1e-2,1", "--batch_size=8", f"--results={results}",
        "--row=tree_hard_P2_W1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "calibration tokens of " in outcome.out
    curve = lines_of(outcome.out)
    assert list(curve) == ["unpruned", "0", "0.01", "1"]
    units = [int(cells[1].replace(",", "")) for cells in curve.values()]
    assert units[0] == 28 and units[-1] == 12 and units == sorted(units, reverse=True)
    rows = record.load_results(str(results))
    assert {row["table"] for row in rows} == {"prune_small"}
    assert {row["metric"] for row in rows} == {
        "val_loss", "bits_per_byte", "loss_rise", "units_kept", "units_share", "bytes",
    }  # fmt: skip
    assert [row["config"]["prune"]["threshold"] for row in rows if row["metric"] == "bytes"] == [
        None,
        0,
        0.01,
        1,
    ]
    page = render(str(results))
    assert "## Pruning, 6 steps" in page and page.count("| `tree_hard_P2_W1` |") == 4
    assert "| unpruned | 28 | 100.0% |" in page and "| 1 | 12 | 42.9% |" in page


def test_a_pruned_run_is_a_run(run, pruned, tmp_path):
    to, said = pruned
    assert "a run at step 0" in said
    found = restore_for_inference(str(to), 0)
    assert all(isinstance(ffn, PrunedSpec) and ffn.is_one_path for ffn in found.model.ffns)
    assert found.meta["pruned"]["threshold"] == 1
    assert "2 x pruned tree: P 2, D 2, W 1, 2 of 8 leaves: F 6, A 6 (100.00 %)" in describe(found.model)[0]
    outcome = call("evaluate", f"--workdir={to}", "--batch_size=8")
    assert outcome.code == 0 and "dead leaves 0.000" in outcome.out, outcome.err
    exported = tmp_path / "exported"
    assert call("export", f"--workdir={to}", f"--to={exported}").code == 0
    spec, variables, _ = export.load(str(exported))
    assert spec == found.model
    header = (exported / export.WEIGHTS).stat().st_size - sizes(spec)["bytes_weights"]
    assert 0 < header < 8192  # a file of rows that are there, and of nothing else
    assert (
        variables["routing"]["run_0"]["ffn"]["child"] == found.variables["routing"]["run_0"]["ffn"]["child"]
    ).all()
    asked = ("--prompt=a b", "--tokens=8", "--seed=1")
    texts = [call("generate", source, *asked) for source in (f"--workdir={to}", f"--export={exported}")]
    assert texts[0].code == 0 and texts[0].out == texts[1].out
    assert call("prune", f"--workdir={to}", "--thresholds=0", "--batch_size=8").code == 0  # once more


@pytest.mark.slow
def test_a_pruned_run_trains_further(texts, pruned, tmp_path):
    """By the config of the run before; how it trains may be another. Then it goes on like any run."""
    to = pruned[0]
    before = restore_for_inference(str(to), 0)
    quiet = {"log": lambda _: None, "bar": False}
    figures = train(config_of(texts, **NEW), str(to), **quiet)
    assert figures["step"] == 4 and math.isfinite(figures["loss"])
    after = restore_for_inference(str(to), "latest")
    assert after.model.ffns == before.model.ffns and after.meta["step"] == 4
    ffn = lambda restored: restored.variables["params"]["run_0"]["ffn"]
    assert ffn(after)["w_in"].shape == ffn(before)["w_in"].shape
    assert (ffn(after)["w_in"] != ffn(before)["w_in"]).any()
    longer = config_of(texts, **NEW | {"train__steps": 6})
    longer.optim.schedule = "constant"
    with pytest.raises(InputError, match="holds a run of another config"):
        train(longer, str(to), **quiet)


def test_one_path_becomes_dense(run, tmp_path):
    to = tmp_path / "static"
    outcome = call("prune", f"--workdir={run}", "--threshold=1", f"--to={to}", "--static", "--batch_size=8")
    assert outcome.code == 0, outcome.err
    found = restore_for_inference(str(to))
    assert found.model.ffns == (DenseSpec(6),) * 2 and sum(map(total_units, found.model.ffns)) == 12
    curve = lines_of(outcome.out)
    assert curve["1"][1] == "12"


LEAVES = {
    "kind": "leaf", "ffn__n_experts": 8, "ffn__expert_width": 3, "ffn__top_k": 2, "ffn__balance_rate": 1e-3,
    "ffn__dense_start": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pruned_leaves(texts, tmp_path_factory):
    """A run of experts pruned to K a layer, the curve that was printed, and its rows."""
    base = tmp_path_factory.mktemp("leaves")
    run, to, results = (str(base / name) for name in ("run", "new", "rows.jsonl"))
    train(tiny_config(texts, **LEAVES), run, log=lambda _: None, bar=False)
    outcome = call(
        "prune", f"--workdir={run}", "--thresholds=0.2,1", "--threshold=1", f"--to={to}", "--batch_size=8",
        f"--results={results}", "--row=leaf_X8",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return to, lines_of(outcome.out), results


def test_a_leaf_run(pruned_leaves):
    to, curve, results = pruned_leaves
    assert [curve[name][1] for name in ("unpruned", "1")] == ["48", "12"]
    assert 12 <= int(curve["0.2"][1]) < 48
    assert "| 1 | 12 | 25.0% |" in render(results)
    found = restore_for_inference(to, 0)
    assert [ffn.n_kept for ffn in found.model.ffns] == [2, 2]
    assert "2 x pruned leaf: 2 of 8 experts of 3, top 2" in describe(found.model)[0]


def test_a_pruned_leaf_run_trains_on(texts, pruned_leaves, tmp_path):
    copy = shutil.copytree(pruned_leaves[0], tmp_path / "run")
    figures = train(tiny_config(texts, **LEAVES | NEW), str(copy), log=lambda _: None, bar=False)
    assert figures["step"] == 4 and math.isfinite(figures["loss"])


@pytest.mark.slow
def test_a_pruned_leaf_run_and_its_export_make_one_text(pruned_leaves, tmp_path):
    to = pruned_leaves[0]
    found = restore_for_inference(to, 0)
    assert "dead leaves 0.000" in call("evaluate", f"--workdir={to}", "--batch_size=8").out
    assert call("export", f"--workdir={to}", f"--to={tmp_path}/out").code == 0
    assert export.load(f"{tmp_path}/out")[0] == found.model
    asked = ("--prompt=a b", "--tokens=8", "--seed=1")
    said = [call("generate", source, *asked) for source in (f"--workdir={to}", f"--export={tmp_path}/out")]
    assert said[0].code == 0 and said[0].out == said[1].out


def test_other_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    (tmp_path / "b.txt").write_text("that is the question " * 500)
    outcome = call(
        "prune", f"--workdir={run}", f"--files={tmp_path}/*.txt", "--thresholds=0", "--batch_size=8",
        "--tokens=4000",
    )  # fmt: skip
    assert outcome.code == 0 and "4,096 calibration tokens of " in outcome.out, outcome.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workdir="], "--workdir"),
        (["--thresholds=0,2"], "threshold: 2.0 is not allowed; use a share of the tokens from 0 to 1"),
        (["--thresholds=0,-1e-3"], "threshold: -0.001 is not allowed"),
        (["--thresholds=few"], "--thresholds: 'few' is not a number"),
        (["--thresholds=nan"], "threshold: nan is not allowed"),
        (["--threshold=1.5", "--to=x"], "threshold: 1.5 is not allowed"),
        (["--threshold=0.5"], "--to is missing"),
        (["--to=x"], "--threshold is missing"),
        (["--threshold=0", "--to={run}"], "is there already; name a new directory"),
        (["--tokens=3999"], "which of 4 leaves are dead takes 4,000 tokens to judge (1,000 each)"),
        (["--tokens=9000000"], "and 9,000,000 are asked for"),
        (["--files={tmp}/?.txt"], "which of 4 leaves are dead takes 4,000 tokens"),
        (["--files={tmp}/none.txt"], "none.txt"),
        (["--tokens=-1"], "--tokens: -1 is not allowed"),
        (["--batch_size=0"], "--batch_size: 0 is not allowed"),
        (["--results=x"], "--row is missing"),
        (["--results=x", "--row=a,b"], "--row: 'a,b' is not allowed"),
        (["--step=5"], "step: 5 has no checkpoint"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("to be or not to be " * 60)
    before = sorted(path for path in run.rglob("*"))
    places = {"run": run, "tmp": tmp_path}
    outcome = call("prune", f"--workdir={run}", *(argument.format(**places) for argument in arguments))
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert sorted(path for path in run.rglob("*")) == before and not (tmp_path / "x").exists()


def test_a_model_without_leaves_is_refused(texts, tmp_path):
    config = tiny_config(texts, kind="dense", ffn__width=14)  # as other tests train it
    train(config, str(tmp_path / "run"), log=lambda _: None, bar=False)
    outcome = call("prune", f"--workdir={tmp_path}/run")
    assert outcome.code == 2 and "it has no layer that can be pruned" in outcome.err


@pytest.mark.slow
def test_pruned_straight_through_cannot_be_trained_but_used(texts, tmp_path):
    config = config_of(texts, ffn__routing="straight_through", steps=2)
    train(config, str(tmp_path / "run"), log=lambda _: None, bar=False)
    asked = ("--threshold=1", f"--to={tmp_path}/new", "--batch_size=8")
    outcome = call("prune", f"--workdir={tmp_path}/run", *asked)
    assert outcome.code == 0, outcome.err
    assert call("evaluate", f"--workdir={tmp_path}/new", "--batch_size=8").code == 0
    with pytest.raises(InputError, match="layer 0 is pruned and cannot be trained"):
        train(config, str(tmp_path / "new"), log=lambda _: None, bar=False)
