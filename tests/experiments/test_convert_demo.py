"""The demonstration: how settings are chosen, what it refuses, and the whole of it at the smallest size."""

import json
import math

import pytest

from experiments.common import loaded
from experiments.conversion import demo_answers
from experiments.conversion.finetune_choice import Settings, choice, config_for
from experiments.lm_eval import answering
from experiments.reporting import record
from experiments.sweeps import tuning
from experiments.tables import render
from tests.experiments.programs import call
from tree_ffn.errors import InputError


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
        (["--tokens=64"], "--tokens: 64 is not allowed; depth 7 takes at least 4,096"),
        (["--n_trees=1"], "have room for 255 units, and the dense layer has 512"),
        (["--config=configs/quickstart.py:kind=tree"], "layer 0 is not dense (ffn.kind 'tree')"),
        (["--texts=a"], "--texts: 'a' is not allowed"),
        (["--config.optim.lr=-1.0"], "optim.lr: -1.0 is not allowed"),
        (["--jobs=-1"], "--jobs: -1 is not allowed; use at least 0"),
        (["--gpus=a"], "--gpus: 'a' is not allowed; use numbers such as 0,1"),
        (["--answers=x"], "--asked is missing"),
        (["--asked=LICENSE"], "--asked: LICENSE, line 2 is not JSON that can be read"),
        (["--part=cluster_seed0"], "--part: 'cluster_seed0' is not allowed; it is done, or waits for others"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, said, tmp_path):
    outcome = call("convert_demo", f"--workdir={tmp_path}/demo", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_whole_of_it_and_again(texts, tmp_path):
    """Dense, converted, tuned, compared; what is there is not made again."""
    asked = (
        "convert_demo", "--config=configs/smoke.py:kind=dense", f"--config.data.files={texts}/*.txt",
        f"--config.data.cache_dir={texts}/cache", "--config.mesh.data=1", "--n_trees=2", "--depth=3",
        "--tokens=512", "--steps=4", "--methods=cluster_spent", "--weights=1", "--refits=0,1",
        "--texts=license=LICENSE", f"--workdir={tmp_path}/demo", f"--results={tmp_path}/conversion.jsonl",
    )  # fmt: skip
    outcome = call(*asked)
    assert outcome.code == 0, outcome.err
    rows = record.load_results(f"{tmp_path}/conversion.jsonl")
    runs = {"cluster_spent_tuned", "cluster_spent_distilled", "cluster_spent_faded", "dense_tuned"}
    conversions = {f"cluster_spent_refits{n}" for n in (0, 1)}
    assert {row["row"] for row in rows} == runs | conversions | {"dense"}
    scored = {row["row"] for row in rows if row["metric"] == "license_nats_per_word"}
    assert scored == runs | {"dense", "cluster_spent_refits1"}
    page = render(f"{tmp_path}/*.jsonl")
    assert "## Conversion" in page and "## Fine-tuning of converted models, 4 steps" in page
    again = call(*asked)
    assert again.code == 0 and "step" not in again.out
    assert again.out.splitlines()[-5:] == outcome.out.splitlines()[-5:]
    assert len(record.load_results(f"{tmp_path}/conversion.jsonl")) == len(rows)


@pytest.fixture
def small(texts, tmp_path):
    """The smallest demonstration, asked three questions: words of its command, but for where it goes."""
    model, ask = loaded.reader("bytes", 32, []), answering.Asked()
    ask.likelihoods([([72, 105], [33]), ([72, 105], [46, 10]), ([40], [41])])
    questions = list(ask.questions.values())
    answering.write_lines(str(tmp_path / "asked.jsonl.xz"), answering.head_of(model), questions, "ask")
    return [
        "--config=configs/smoke.py:kind=dense", f"--config.data.files={texts}/*.txt",
        f"--config.data.cache_dir={texts}/cache", "--config.mesh.data=1", "--n_trees=2", "--depth=3",
        "--tokens=512", "--steps=2", "--methods=cluster", "--weights=1", "--refits=1", "--lrs=1e-3,2e-3,9",
        "--texts=license=LICENSE", f"--asked={tmp_path}/asked.jsonl.xz",
    ]  # fmt: skip


def rows_of(path):
    """{(row, metric): value} of a results file."""
    return {(row["row"], row["metric"]): row["value"] for row in record.load_results(str(path))}


@pytest.mark.slow
def test_processes_make_what_one_process_makes(small, tmp_path):
    """The same rows, directories and answers; nothing is made again; the command is the one given."""
    found = {}
    for jobs in (0, 2):
        place = tmp_path / str(jobs)
        files = f"--results={place}/rows.jsonl", f"--answers={place}/answers.jsonl.xz"
        asked = ("convert_demo", *small, f"--workdir={place}/demo", f"--jobs={jobs}", *files)
        outcome = call(*asked)
        assert outcome.code == 0, outcome.err
        answers = demo_answers.read(f"{place}/answers.jsonl.xz", f"{tmp_path}/asked.jsonl.xz")
        # Without digests: they are of configs that name the directory of the start.
        runs = sorted(path.name.rpartition("_")[0] for path in (place / "demo" / "seed0").iterdir())
        found[jobs] = rows_of(place / "rows.jsonl"), runs, answers
        again = call(*asked)
        assert again.code == 0 and "done in" not in again.out and "step" not in again.out
        commands = {row["command"] for row in record.load_results(f"{place}/rows.jsonl")}
        assert len(commands) == 1 and "--part" not in commands.pop()
    (rows, runs, answers), (other_rows, other_runs, other_answers) = found[0], found[2]
    assert other_runs == runs
    assert other_rows == pytest.approx(rows, rel=1e-4)
    assert [one.row for one in answers] == [one.row for one in other_answers]
    assert {one.row for one in answers} == {row for row, metric in rows if metric == "license_loss"}
    pairs = [([72, 105], [33]), ([40], [41])]
    for one, other in zip(answers, other_answers):
        for (nats, greedy), (other_nats, other_greedy) in zip(
            one.answers.likelihoods(pairs), other.answers.likelihoods(pairs), strict=True
        ):
            assert nats < 0 and (other_nats, other_greedy) == (pytest.approx(nats, abs=1e-3), greedy)


@pytest.mark.slow
def test_what_waits_for_a_part_that_failed_is_not_made(small, tmp_path):
    """Of a dense model that cannot be loaded nothing is made; the log says why."""
    (tmp_path / "dense").mkdir()
    outcome = call(
        "convert_demo", *small, f"--workdir={tmp_path}/demo", f"--dense={tmp_path}/dense", "--jobs=2"
    )
    assert outcome.code == 1, outcome.err
    assert "cluster_seed0: " in outcome.err and f"{tmp_path}/demo/logs/cluster_seed0.txt" in outcome.err
    assert "FAILED" in outcome.out and "cluster_tuned" not in outcome.out


def test_questions_of_another_file_are_refused(tmp_path):
    model = loaded.reader("bytes", 32, [])
    for name, ids in (("one", [33]), ("two", [34])):
        ask = answering.Asked()
        ask.likelihoods([([72], ids)])
        head = answering.head_of(model)
        answering.write_lines(f"{tmp_path}/{name}", head, list(ask.questions.values()), "ask")
    assert demo_answers.gather(f"{tmp_path}/answers", f"{tmp_path}/one", [str(tmp_path)]) == 0
    assert demo_answers.read(f"{tmp_path}/answers", f"{tmp_path}/one") == []
    with pytest.raises(InputError, match="--asked: .*two has not the questions that .*answers answers"):
        demo_answers.read(f"{tmp_path}/answers", f"{tmp_path}/two")
