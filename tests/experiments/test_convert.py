"""From a trained dense run, or an export, to runs of leaves and of paths that the other programs read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.models import DenseSpec, Transformer, export, total_units
from tree_ffn.models.cost import describe
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.tree import LeafSpec, TreeSpec

ASKED = ("--tokens=512", "--held_out=256", "--batch_size=8", "--batches=2")
PATHS = ("--kind=tree", "--n_trees=2", "--depth=2")
LEAVES = ("--n_experts=8", "--top_k=3")


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    train(tiny_config(texts, kind="dense", ffn__width=14), str(workdir), log=lambda _: None, bar=False)
    return workdir


@pytest.fixture(scope="module", params=[PATHS, LEAVES], ids=["paths", "leaves"])
def converted(run, request, tmp_path_factory):
    """Directory of a run and of results rows, what the program said, and whether it is of leaves."""
    to = tmp_path_factory.mktemp("converted")
    outcome = call(
        "convert", f"--workdir={run}", *ASKED, *request.param, "--method=cluster", "--seed=3",
        "--methods=random,frequency", f"--to={to}/new", f"--results={to}/rows.jsonl",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return to, outcome.out, request.param == LEAVES


# Where converted layers are used as any others of their kind, which have tests of their own.
one_kind = pytest.mark.parametrize(
    "converted", [LEAVES, pytest.param(PATHS, marks=pytest.mark.slow)], ids=["leaves", "paths"], indirect=True
)


def test_the_table_and_its_rows(converted):
    to, out, of_leaves = converted
    assert "512 calibration tokens of " in out
    # 2 A and the routers asked of 2 F: 6 units and 2 x 2 routers of 14; 6 units and 1 + 2 + 3 routers of 14.
    said, name, cells = (
        "6 of 14 units active (42.86 %), with routers 57.14 % of",
        "separate_P2_D2_W1",
        "42.9% | 57.1%",
    )
    if of_leaves:
        said, name, cells = (
            "6 of 16 units active (37.50 %), with routers 64.29 % of",
            "leaf_X8_W2_K3",
            "37.5% | 64.3%",
        )
    assert said in out
    lines = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if re.search(r"\d\.\d{3} +-?\d", line)
    }
    assert {"random", "frequency", "cluster", "oracle", "static"} <= lines.keys()
    assert float(lines["cluster/experts"][0]) >= float(lines["cluster"][0]) > float(lines["random"][0]) - 0.1
    rows = record.load_results(f"{to}/rows.jsonl")
    assert {row["row"] for row in rows} == {
        f"{method}_{name}_refits3" for method in ("random", "frequency", "cluster")
    }
    assert {(row["table"], row["seed"]) for row in rows} == {("conversion", 3)}  # not that of the dense run
    page = render(f"{to}/rows.jsonl")
    assert "## Conversion" in page and f"| `cluster_{name}_refits3` | {cells} |" in page
    losses, shares = {"val_loss", "loss_rise"}, {"active_share", "flops_share"}
    kept = {"kept", "kept_experts", "kept_oracle", "kept_static"}
    assert {row["metric"] for row in rows} == losses | shares | kept


def test_what_is_written_is_a_run(converted):
    to, _, of_leaves = converted
    found = restore_for_inference(f"{to}/new", 0)
    assert found.meta["converted"]["method"] == "cluster" and found.meta["converted"]["tokens"] == 512
    if of_leaves:
        layer = LeafSpec(n_experts=8, expert_width=2, top_k=3, gate_norm="rms")
        assert set(found.model.ffns) == {layer}
    else:
        assert all(isinstance(ffn, TreeSpec) and ffn.router == "frozen" for ffn in found.model.ffns)
        assert "frozen separate routers, whose 4 products a token" in describe(found.model)[0]
    assert call("evaluate", f"--workdir={to}/new", "--batch_size=8").code == 0


@one_kind
def test_its_export_makes_the_text_of_the_run(converted, tmp_path):
    to = converted[0]
    assert call("export", f"--workdir={to}/new", f"--to={tmp_path}/out").code == 0
    asked = ("--prompt=a b", "--tokens=8", "--seed=1")
    texts = [
        call("generate", source, *asked) for source in (f"--workdir={to}/new", f"--export={tmp_path}/out")
    ]
    assert texts[0].code == 0 and texts[0].out == texts[1].out


def test_it_runs_outside_of_this_library(converted):
    """A program of jax.export for any number of rows."""
    found = restore_for_inference(f"{converted[0]}/new", 0)
    program = jax.jit(lambda variables, tokens: Transformer(found.model).apply(variables, tokens)[0])
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), found.variables)
    tokens = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, 32"), jnp.int32)
    exported = jax_export.export(program)(shapes, tokens)
    rows = jnp.arange(96, dtype=jnp.int32).reshape(3, 32)
    want = program(found.variables, rows)
    np.testing.assert_allclose(exported.call(found.variables, rows), want, atol=1e-4, rtol=1e-4)


@one_kind
def test_it_is_fine_tuned_and_pruned_as_any_other(run, converted, tmp_path):
    """Towards its dense model, whose layers fade out; then without what text hardly visits."""
    words = [
        f"--config.finetune.{name}={value}"
        for name, value in {
            "start": f"{converted[0]}/new", "teacher": run, "kl": 1.0, "ffn": 1.0, "gradual": "mix",
            "gradual_steps": 4,
        }.items()
    ]  # fmt: skip
    sizes = ("--config.train.batch_size=8", "--config.train.eval_batches=2", "--config.mesh.data=1")
    outcome = call(
        "finetune", "--config=configs/finetune.py:steps=8", f"--workdir={tmp_path}/tuned", *words, *sizes,
        "--config.data.workers=0", "--config.optim.lr=1e-2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    losses = {line.split()[0]: float(line.split()[1]) for line in outcome.out.splitlines()[-3:]}
    assert losses["after"] < losses["before"]
    outcome = call(
        "prune", f"--workdir={tmp_path}/tuned", "--threshold=0.3", f"--to={tmp_path}/pruned", "--batch_size=8"
    )
    assert outcome.code == 0, outcome.err
    ffns = restore_for_inference(f"{tmp_path}/pruned").model.ffns
    whole = restore_for_inference(f"{tmp_path}/tuned").model.ffns
    assert sum(map(total_units, ffns)) < sum(map(total_units, whole))
    assert call("evaluate", f"--workdir={tmp_path}/pruned", "--batch_size=8").code == 0


def test_an_export_with_text_named(texts, run, tmp_path):
    assert call("export", f"--workdir={run}", f"--to={tmp_path}/dense").code == 0
    outcome = call(
        "convert", f"--export={tmp_path}/dense", f"--files={texts}/*.txt", f"--cache_dir={tmp_path}/cache",
        *ASKED, *PATHS, "--depth=3", "--router=spent", "--method=frequency", f"--to={tmp_path}/new",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = restore_for_inference(f"{tmp_path}/new")
    ffn = found.model.ffns[0]
    assert isinstance(ffn, TreeSpec)
    assert ffn.routing == "straight_through" and ffn.shape.depth == 3
    assert isinstance(export.load(f"{tmp_path}/dense")[0].ffns[0], DenseSpec)
    assert call("evaluate", f"--workdir={tmp_path}/new", "--batch_size=8").code == 0


@pytest.mark.parametrize(
    "kind, arguments, said",
    [
        (PATHS, ["--workdir="], "--workdir or --export: give one of them"),
        (PATHS, ["--export=x"], "--workdir or --export: give one of them"),
        (PATHS, ["--to=x"], "--method is missing"),
        (PATHS, ["--method=random"], "--to is missing"),
        (PATHS, ["--methods=random,best"], "--method: 'best' is not known; use one of: random, frequency"),
        (PATHS, ["--router=none"], "router: 'none' is not known; use one of: separate, spent"),
        (PATHS, ["--method=random", "--to={run}"], "is there already; name a new directory"),
        (PATHS, ["--node_width=a"], "--node_width: 'a' is not allowed"),
        (PATHS, ["--node_width=1,2"], "node_width: (1, 2) has 2 widths"),
        (PATHS, ["--n_trees=0"], "n_trees: 0 is not allowed"),
        (PATHS, ["--top_k=2"], "--top_k: is not allowed with --kind=tree; leave it out"),
        (PATHS, ["--max_share=0.05"], "--max_share: 0.05 is not reached by this layer, 42.9% of whose units"),
        (PATHS, ["--n_trees=1"], "have room for 7 units, and the dense layer has 14"),
        (PATHS, ["--router=spent"], "(6 units of them are spent on routers) have room for 8 units"),
        (PATHS, ["--depth=5"], "--tokens: 512 is not allowed; routers are fitted to 32 visits of every leaf, "
         "which takes at least 1,024 tokens here"),
        (LEAVES, ["--n_experts=6"], "n_experts: 6 is not allowed with n_trees = 1; use n_trees times"),
        (LEAVES, ["--n_experts=0"], "--n_experts: 0 is not allowed"),
        (LEAVES, ["--top_k=9"], "top_k: 9 is not allowed; a token can use at most n_experts = 8"),
        (LEAVES, ["--top_k=1"], "gate_norm: 'rms' cannot be used with top_k 1"),
        (LEAVES, ["--n_trees=4"], "n_trees: 4 is not allowed"),
        (LEAVES, ["--expert_width=-1"], "--expert_width: -1 is not allowed"),
        (LEAVES, ["--expert_width=1"], "8 experts of expert_width 1 have room for 8 units, and the dense"),
        (LEAVES, ["--gate_norm=l3"], "--gate_norm"),
        (LEAVES, ["--kind=mixture"], "--kind"),
        (LEAVES, ["--depth=2"], "--depth: is not allowed with --kind=leaf; leave it out"),
        (LEAVES, ["--router=spent"], "--router: is not allowed with --kind=leaf; leave it out"),
        (LEAVES, ["--n_experts=64"], "which takes at least 683 tokens here"),
        (LEAVES, ["--tokens=9000000"], "and 9,000,000 are needed; use more text"),
        (LEAVES, ["--refits=-1"], "--refits: -1 is not allowed"),
        (LEAVES, ["--held_out=0"], "--held_out: 0 is not allowed"),
        (LEAVES, ["--files={tmp}/none.txt"], "none.txt"),
        (LEAVES, ["--step=5"], "step: 5 has no checkpoint"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_exit_code_2(run, kind, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "tmp": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    outcome = call("convert", f"--workdir={run}", *ASKED, *kind, *given)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert not (tmp_path / "x").exists()


def test_sparse_layers_are_not_dense(converted):
    to, _, of_leaves = converted
    outcome = call("convert", f"--workdir={to}/new", *ASKED, *LEAVES)
    assert outcome.code == 2
    assert f"layer 0 is not dense (ffn.kind {'leaf' if of_leaves else 'tree'!r})" in outcome.err
