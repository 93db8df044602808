"""From a converted run to a fine-tuned one: figures, resuming to the bit, questions, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.conversion.finetuning import trainable
from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config, tiny_model
from tree_ffn.models import spec_from_dict, spec_to_dict
from tree_ffn.training.loop import train
from tree_ffn.training.plan import check_trainable
from tree_ffn.training.restore import Restored, restore_for_inference
from tree_ffn.training.workdir import read_json


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """A dense run and what it was converted to."""
    base = tmp_path_factory.mktemp("runs")
    train(tiny_config(texts, kind="dense", ffn__width=14), f"{base}/dense", log=lambda _: None, bar=False)
    outcome = call(
        "convert", f"--workdir={base}/dense", "--kind=tree", "--n_trees=2", "--depth=2", "--tokens=512",
        "--held_out=256", "--batch_size=8", "--batches=2", "--method=frequency", f"--to={base}/trees",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return base


def asked(texts, runs, workdir, steps=6, **changes):
    """The command line of a tiny run."""
    values = {
        "finetune.start": f"{runs}/trees", "finetune.teacher": f"{runs}/dense", "finetune.kl": 1.0,
        "finetune.ffn": 1.0, "data.files": f"{texts}/*.txt", "data.cache_dir": f"{texts}/cache",
        "data.workers": 0, "mesh.data": 1, "train.batch_size": 8,
        "train.eval_batches": 2, "train.checkpoint_every": 3,
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in values.items()]
    return ["finetune", f"--config=configs/finetune.py:steps={steps}", f"--workdir={workdir}", *words]


@pytest.fixture(scope="module")
def tuned(texts, runs):
    to = runs / "tuned"
    mix = {"finetune__gradual": "mix", "finetune__gradual_steps": 4}
    outcome = call(
        *asked(texts, runs, to, **mix), f"--results={runs}/rows.jsonl", "--row=frequency_distilled"
    )
    assert outcome.code == 0, outcome.err
    return to, outcome.out


def test_before_during_and_after(runs, tuned):
    to, out = tuned
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert {"teacher", "before", "after"} <= lines.keys()
    before = read_json(str(to), "before.json")
    assert before and float(lines["before"][0]) == round(before["before"]["loss"], 4)
    assert float(lines["after"][0]) < float(lines["before"][0])
    metrics = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["split"] == "valid" for line in metrics) >= 3
    rows = record.load_results(f"{runs}/rows.jsonl")
    found = {row["metric"]: row for row in rows}
    page = render(f"{runs}/rows.jsonl")
    assert "## Fine-tuning of converted models, 6 steps" in page and "| `frequency_distilled` |" in page
    assert {"val_loss", "loss_before", "loss_teacher"} <= found.keys()
    assert found["val_loss"]["config"]["finetune"]["converted"]["method"] == "frequency"
    assert "start" not in found["val_loss"]["config"]["finetune"]
    recorded = (f"--results={runs}/scored.jsonl", "--row=scored", "--table=conversion")
    assert call("evaluate", f"--workdir={to}", "--batch_size=8", *recorded).code == 0
    config = record.load_results(f"{runs}/scored.jsonl")[0]["config"]  # of the model that it has
    assert "ffn" not in config and config["finetune"]["converted"]["method"] == "frequency"
    assert config["model"] == found["val_loss"]["config"]["model"]


@pytest.mark.slow
def test_resuming_changes_no_bit(texts, runs, tuned):
    """Six steps at once, and three, then the others by the same command."""
    to = runs / "resumed"
    mix = {"finetune__gradual": "mix", "finetune__gradual_steps": 4}
    flat = {
        "optim__schedule": "constant",
        "optim__warmup_steps": 0,
        "train__log_every": 1,
        "train__eval_every": 3,
    }
    whole = runs / "whole"
    assert call(*asked(texts, runs, whole, **mix, **flat)).code == 0
    halves = [call(*asked(texts, runs, to, steps, **(mix | flat | {"finetune__gradual_steps": 4})))
              for steps in (4, 6)]  # fmt: skip
    assert [half.code for half in halves] == [0, 0], halves
    assert "resumed at step 4" in halves[1].out
    ends = [restore_for_inference(str(workdir), 6).variables for workdir in (whole, to)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *ends)


def test_questions_train_the_answers(runs, texts, tmp_path):
    lines = [json.dumps({"q": f"{n} of {n}:", "a": " a tree"}) for n in range(80)]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))
    questions = {"finetune__task": "qa", "data__files": f"{tmp_path}/*.jsonl", "finetune__prompt_field": "q",
                 "finetune__answer_field": "a", "data__valid_share": 0.3,
                 "finetune__weights": "ffn"}  # fmt: skip
    outcome = call(*asked(texts, runs, tmp_path / "qa", steps=12, optim__lr=0.01, **questions))
    assert outcome.code == 0, outcome.err
    lines = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line}
    assert float(lines["after"][0]) < float(lines["before"][0])
    found, before = (
        restore_for_inference(str(place), "latest") for place in (tmp_path / "qa", runs / "trees")
    )
    params = lambda run: run.variables["params"]
    np.testing.assert_array_equal(params(found)["embed"]["tokens"], params(before)["embed"]["tokens"])
    assert (params(found)["run_0"]["ffn"]["w_out"] != params(before)["run_0"]["ffn"]["w_out"]).any()


def test_an_export_is_a_start(runs, texts, tmp_path):
    assert call("export", f"--workdir={runs}/dense", f"--to={tmp_path}/out").code == 0
    plain = {"finetune__start": f"{tmp_path}/out", "finetune__teacher": "", "finetune__kl": 0.0,
             "finetune__ffn": 0.0}  # fmt: skip
    outcome = call(*asked(texts, runs, tmp_path / "new", steps=3, **plain))
    assert outcome.code == 0 and "teacher" not in outcome.out, outcome.err


@pytest.mark.slow
def test_the_text_is_the_starts_unless_another_is_named(runs, texts, tmp_path):
    """Text, splits, tokenizer and cache of the dense run that was converted; an export says none."""
    plain = {"finetune__teacher": "", "finetune__kl": 0.0, "finetune__ffn": 0.0}
    named = ("--config.data.files", "--config.data.cache")
    unnamed = lambda words: [word for word in words if not word.startswith(named)]
    outcome = call(*unnamed(asked(texts, runs, tmp_path / "new", steps=3, **plain)))
    assert outcome.code == 0, outcome.err
    assert f"trains on {texts}/*.txt, the text of finetune.start" in outcome.out
    new, old = (read_json(str(place), "data.json") for place in (tmp_path / "new", runs / "dense"))
    assert new == old
    config = read_json(str(tmp_path / "new"), "config.json")
    assert config and config["data"]["corpus"] == "files" and config["data"]["tokenizer"] == "bytes"
    assert "resumed at step 3" in call(*unnamed(asked(texts, runs, tmp_path / "new", steps=3, **plain))).out

    (tmp_path / "other").mkdir()
    for path in texts.glob("*.txt"):
        (tmp_path / "other" / path.name).write_text("other words " + path.read_text())
    other = {"data__files": f"{tmp_path}/other/*", **plain}
    outcome = call(*asked(texts, runs, tmp_path / "on_other", steps=3, **other))
    assert f"trains on {tmp_path}/other/*, another text than that of finetune.start" in outcome.out

    assert call("export", f"--workdir={runs}/dense", f"--to={tmp_path}/out").code == 0
    for changes, what in (
        ({"finetune__start": f"{tmp_path}/out"}, "text"),
        ({"finetune__task": "qa"}, "questions"),
    ):
        outcome = call(*unnamed(asked(texts, runs, tmp_path / "none", steps=3, **plain, **changes)))
        assert outcome.code == 2 and f"says no {what} to train on: name files" in outcome.err, outcome
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"finetune__start": ""}, "finetune.start: '' is not allowed"),
        ({"finetune__start": "nowhere"}, "nowhere"),
        ({"finetune__teacher": ""}, "finetune.teacher: '' is not allowed where kl, ffn or gradual"),
        ({"finetune__teacher": "{runs}/trees"}, "finetune.teacher: layer 0 is not a dense one"),
        ({"finetune__task": "chat"}, "finetune.task: 'chat' is not known; use one of: lm, qa"),
        ({"finetune__gradual": "mix", "finetune__gradual_steps": 7}, "use at most train.steps = 6"),
        ({"finetune__step": "5"}, "step: 5 has no checkpoint"),
        ({"optim__lr": -1.0}, "optim.lr: -1.0 is not allowed"),
        ({"train__batch_size": 0}, "train.batch_size: 0 is not allowed"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(runs, texts, tmp_path, changes, said):
    changes = {key: v.format(runs=runs) if isinstance(v, str) else v for key, v in changes.items()}
    outcome = call(*asked(texts, runs, tmp_path / "new", **changes))
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
    assert not (tmp_path / "new").exists()


def test_other_configs_are_refused(tmp_path):
    outcome = call("finetune", "--config=configs/smoke.py", f"--workdir={tmp_path}/new")
    assert outcome.code == 2 and "it has no section finetune; use configs/finetune.py" in outcome.err


def test_a_start_of_16_bits_is_trained_in_float32():
    model = dataclasses.replace(tiny_model("dense"), param_dtype="bfloat16")
    low = {"params": {"w_in": jnp.full(3, 1.5, jnp.bfloat16)}, "routing": {"salt": jnp.int32(7)}}
    start = trainable(Restored(None, model, low, {"model": spec_to_dict(model), "step": 0}, None))
    assert start.variables["params"]["w_in"].dtype == jnp.float32
    assert start.variables["params"]["w_in"].tolist() == [1.5] * 3 and start.variables["routing"]["salt"] == 7
    assert start.model.param_dtype == spec_from_dict(start.meta["model"]).param_dtype == "float32"
    check_trainable(start.model)
