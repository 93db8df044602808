"""The demonstration: how settings are chosen, what it refuses, and the whole of it at the smallest size."""

import json
import math

import pytest

from experiments.conversion.finetune_choice import Settings, choice, config_for
from experiments.reporting import record
from experiments.sweeps import tuning
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.training.plan import resolved
from tree_ffn.upgrades import stamped


def test_both_ways_are_tuned_by_one_rule():
    """The lowest loss of rates, then of other weights, or of rates beside the best."""
    grid = tuning.Grid("optim.lr", (1e-3, 2e-3, 4e-3), 2)
    found = {}
    for way, best in (("tuned", Settings(2.8e-3, 0.0)), ("distilled", Settings(2e-3, 0.3))):
        known, rounds = {}, []
        while True:
            found[way], missing = choice(known.get, grid, [1.0, 0.3], way == "distilled")
            if not missing:
                break
            assert found[way] is None
            rounds.append(len(missing))
            for lr, weight in missing:
                known[lr, weight] = abs(lr / best.lr - 1) + abs(weight - best.weight)
        assert rounds == [3, 1]
    assert found == {"tuned": Settings(2.83e-3, 0.0), "distilled": Settings(2e-3, 0.3)}


def test_rates_that_diverged_are_not_chosen():
    grid = tuning.Grid("optim.lr", (1e-3, 2e-3, 4e-3), 0)
    loss = lambda settings: 2.0 if settings.lr == 1e-3 else math.inf
    assert choice(loss, grid, [1.0], True) == (Settings(1e-3, 1.0), [])


def test_the_config_has_text_and_batches_of_the_dense_run(tmp_path):
    trained = {"data": {"files": "a.txt"}, "mesh": {"data": 1, "model": 1},
               "train": {"batch_size": 5, "grad_accum_steps": 1, "eval_batches": 3}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(trained))
    config = config_for(str(tmp_path), "start", Settings(2e-3, 0.5), steps=30, seed=4, faded=True)
    assert (config.data.files, config.train.batch_size, config.train.eval_batches) == ("a.txt", 5, 3)
    assert (config.optim.lr, config.finetune.kl, config.finetune.ffn, config.seed) == (2e-3, 0.5, 0.5, 4)
    assert (config.finetune.gradual, config.finetune.gradual_steps) == ("mix", 15)
    assert (
        config_for(str(tmp_path), "start", Settings(2e-3, 0.5), steps=30, seed=4).finetune.gradual == "none"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods=cluster,best_spent"], "--methods: 'best_spent' is not known; use one of: random"),
        (["--methods="], "--methods is empty"),
        (["--seeds=a"], "--seeds: 'a' is not allowed; use whole numbers"),
        (["--refits=-1"], "--refits: '-1' is not allowed; use whole numbers"),
        (["--steps=0"], "--steps: 0 is not allowed"),
        (["--lrs=1e-3"], "values [0.001] is not allowed; use at least 3"),
        (["--weights=none"], "--weights: 'none' is not allowed; use numbers above 0"),
        (["--tokens=64", "--methods=cluster_spent"], "which takes at least 4,096 tokens for cluster_spent"),
        (["--tokens=64", "--methods=cluster_leaf"], "which takes at least 1,024 tokens for cluster_leaf"),
        (["--top_k=600"], "top_k: 600 is not allowed; a token can use at most n_experts = 512"),
        (["--expert_width=1", "--n_experts=256", "--methods=random_leaf"], "have room for 256 units"),
        (["--dense={tmp}"], "holds no run; name the workdir of one"),
        (["--n_trees=1", "--methods=cluster"], "have room for 255 units, and the dense layer has 512"),
        (["--config=configs/quickstart.py:kind=tree"], "layer 0 is not dense (ffn.kind 'tree')"),
        (["--texts=a"], "--texts: 'a' is not allowed"),
        (["--config.optim.lr=-1.0"], "optim.lr: -1.0 is not allowed"),
        (["--jobs=-1"], "--jobs: -1 is not allowed; use at least 0"),
        (["--gpus=a"], "--gpus: 'a' is not allowed; use numbers such as 0,1"),
        (["--part=cluster_seed0"], "--part: 'cluster_seed0' is not allowed; it is done, or waits for others"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, said, tmp_path):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    outcome = call("convert_demo", f"--workdir={tmp_path}/demo", *given)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_whole_of_it_and_again(texts, tmp_path):
    """Dense, converted, tuned, compared; what is there is not made again."""
    asked = (
        "convert_demo", "--config=configs/smoke.py:kind=dense", f"--config.data.files={texts}/*.txt",
        f"--config.data.cache_dir={texts}/cache", "--config.mesh.data=1", "--n_trees=2", "--depth=3",
        "--n_experts=8", "--top_k=3", "--tokens=512", "--steps=4", "--methods=cluster_spent,cluster_leaf",
        "--weights=1", "--refits=0,1",
        "--texts=license=LICENSE", f"--workdir={tmp_path}/demo", f"--results={tmp_path}/conversion.jsonl",
    )  # fmt: skip
    outcome = call(*asked)
    assert outcome.code == 0, outcome.err
    rows = record.load_results(f"{tmp_path}/conversion.jsonl")
    paths, leaves = "cluster_spent_P2_D3_W1", "cluster_leaf_X8_W2_K3"
    runs = {f"{name}_{way}" for name in (paths, leaves) for way in ("tuned", "distilled")}
    runs |= {f"{leaves}_faded", *(row["row"] for row in rows if row["row"].startswith("dense_tuned_lr"))}
    conversions = {f"{name}_refits{n}" for name in (paths, leaves) for n in (0, 1)}
    assert {row["row"] for row in rows} == runs | conversions | {"dense"} and len(runs) == 6
    scored = {row["row"] for row in rows if row["metric"] == "license_nats_per_word"}
    assert scored == runs | {"dense", f"{paths}_refits1", f"{leaves}_refits1"}
    page = render(f"{tmp_path}/*.jsonl")
    assert "## Conversion" in page and "## Fine-tuning of converted models, 4 steps" in page
    again = call(*asked)
    assert again.code == 0 and "step" not in again.out
    assert again.out.splitlines()[-7:] == outcome.out.splitlines()[-7:]
    assert len(record.load_results(f"{tmp_path}/conversion.jsonl")) == len(rows)


@pytest.fixture
def small(texts):
    """The smallest demonstration: words of its command, but for where it goes."""
    return [
        "--config=configs/smoke.py:kind=dense", f"--config.data.files={texts}/*.txt",
        f"--config.data.cache_dir={texts}/cache", "--config.mesh.data=1", "--n_trees=2", "--depth=3",
        "--tokens=512", "--steps=2", "--methods=cluster", "--weights=1", "--refits=1", "--lrs=1e-3,2e-3,9",
        "--texts=license=LICENSE",
    ]  # fmt: skip


def rows_of(path):
    """{(row, metric): value} of a results file."""
    return {(row["row"], row["metric"]): row["value"] for row in record.load_results(str(path))}


@pytest.mark.slow
def test_processes_make_what_one_process_makes(small, tmp_path):
    """The same rows and directories; nothing is made again; the command is the one given."""
    found = {}
    for jobs in (0, 2):
        place = tmp_path / str(jobs)
        files = f"--results={place}/rows.jsonl"
        asked = ("convert_demo", *small, f"--workdir={place}/demo", f"--jobs={jobs}", files)
        outcome = call(*asked)
        assert outcome.code == 0, outcome.err
        # Without digests: they are of configs that name the directory of the start.
        runs = sorted(path.name.rpartition("_")[0] for path in (place / "demo" / "seed0").iterdir())
        found[jobs] = rows_of(place / "rows.jsonl"), runs
        again = call(*asked)
        assert again.code == 0 and "done in" not in again.out and "step" not in again.out
        commands = {row["command"] for row in record.load_results(f"{place}/rows.jsonl")}
        assert len(commands) == 1 and "--part" not in commands.pop()
    (rows, runs), (other_rows, other_runs) = found[0], found[2]
    assert other_runs == runs
    assert other_rows == pytest.approx(rows, rel=1e-4)


@pytest.mark.slow
def test_what_waits_for_a_part_that_failed_is_not_made(small, texts, tmp_path):
    """Of a dense run without a checkpoint nothing is made; the log says why."""
    (tmp_path / "dense").mkdir()
    config = stamped(resolved(tiny_config(texts, kind="dense")))
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    outcome = call(
        "convert_demo", *small, f"--workdir={tmp_path}/demo", f"--dense={tmp_path}/dense", "--jobs=2"
    )
    assert outcome.code == 1, outcome.err
    assert "cluster_seed0: " in outcome.err and f"{tmp_path}/demo/logs/cluster_seed0.txt" in outcome.err
    assert "FAILED" in outcome.out and "cluster_tuned" not in outcome.out
