"""A whole run in this process: what it writes, how it ends early, how it goes on."""

import contextlib
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.kinds_of_tokenizers import tokenizer_json
from tests.training.tiny import tiny_config, tiny_model
from tree_ffn.data import valid_batches
from tree_ffn.errors import InputError
from tree_ffn.training import optimizer, sharding
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.compiled import Score, Scorer
from tree_ffn.training.evaluate import other_corpus
from tree_ffn.training.logger import Report
from tree_ffn.training.loop import train
from tree_ffn.training.plan import plan_run
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.training.signals import STOPS, Diverged, Interrupted, StopSignals
from tree_ffn.training.usage_log import usage_files


def quiet(config, workdir, log=lambda _: None):
    return train(config, str(workdir), log=log, bar=False)


def lines(workdir):
    return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """(workdir, metrics, lines of the log) of a run of 6 steps."""
    workdir, log = tmp_path_factory.mktemp("finished"), []
    return workdir, quiet(tiny_config(texts, train__probe=True), workdir, log.append), log


def test_characters_without_a_token_are_said_before_and_after(tmp_path):
    """They have no bytes, so bits per byte are those of what is predicted."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json("unigram"))
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("the tree stands by the river " * 50 + "東" * (number == 0))
    log = []
    config = tiny_config(tmp_path, "dense", steps=2, data__tokenizer=f"{tmp_path}/tokenizer.json")
    metrics = quiet(config, tmp_path / "run", log.append)
    said = [line for line in log if "no token for 1 of 11,601 characters, the first of them '東'" in line]
    assert len(said) == 2 and said[0] == said[1] == log[-1]
    facts = json.loads((tmp_path / "run/data.json").read_text())["splits"]
    assert sum(split["bytes"] for split in facts.values()) == 11_600
    per_token = facts["valid"]["bytes"] / facts["valid"]["tokens"]
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / np.log(2) / per_token)


def test_what_a_run_writes(finished):
    workdir, metrics, _ = finished
    written = [(line["split"], line["step"]) for line in lines(workdir)]
    assert written == [("train", 2), ("valid", 3), ("train", 4), ("train", 6), ("valid", 6)]
    train_line, valid_line = lines(workdir)[-2:]
    names = ("dead_leaves", "leaf_entropy", "constant_decisions", "right_share", "skew")
    usage = {f"{name}/{i}" for name in names for i in (0, 1)}
    probed = {f"{name}/1" for name in ("changed", "working_units", "ever_working", "gradient_right")}
    assert train_line.keys() >= usage | {"loss", "ppl", "lr", "grad_norm", "update_norm", "tokens_per_s"}
    assert valid_line.keys() >= usage | probed | {"loss", "ppl", "bits_per_byte", "tokens"}
    # A line's rate is that of its last step: cosine over 6 steps, the first 2 of them rising, to a tenth.
    assert [line["lr"] for line in lines(workdir) if line["split"] == "train"] == pytest.approx(
        [1e-3 * share for share in (1.0, 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.1 + 0.9 * (1 - 0.5**0.5) / 2)]
    )
    assert metrics["loss"] == valid_line["loss"] < lines(workdir)[1]["loss"]
    assert metrics["step"] == 6 and metrics["active_share"] == 8 / 30 and metrics["train_loss"] > 0
    assert metrics["products"] == 16
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "data.json", "metrics.jsonl", "usage", "probe_leaves.npz", "tensorboard",
        "checkpoints",
    }  # fmt: skip


def test_usage_over_time(finished):
    """Two layers of 2 trees with 8 leaves; 6 steps of 8 x 32 tokens; validations of 2 batches at 3 and 6."""
    workdir, metrics, _ = finished
    arrays = {}
    for path, step, split in usage_files(str(workdir)):
        with np.load(path) as file:
            arrays |= {(step, split, name.removeprefix("0/")): array for name, array in file.items()}
    probed = ("gradient", "peak", "working")
    expected = [(3, "train", "visits"), (3, "valid", "visits"), *((3, "valid", name) for name in probed)]
    expected += [(6, "train", "visits"), (6, "valid", "visits"), (6, "valid", "moved")]
    assert list(arrays) == expected + [(6, "valid", name) for name in probed]

    # A window of training is written at the next validation; lines of metrics are due every 2 steps.
    assert [int(arrays[step, "train", "visits"].sum(-1)[0, 0]) for step in (3, 6)] == [2 * 256, 4 * 256]
    visits = arrays[6, "valid", "visits"]
    assert visits.shape == (2, 2, 8) and (visits.sum(axis=-1) == 2 * 256).all()
    moved = arrays[6, "valid", "moved"]
    assert moved.shape == (2, 2, 4) and (moved[:, :, 0] == 0).all() and (np.diff(moved, axis=-1) >= 0).all()
    assert metrics["changed/1"] == pytest.approx(moved[1, :, -1].mean())
    assert arrays[6, "valid", "peak"].dtype == np.float16
    run = restore_for_inference(str(workdir), "latest")
    corpus = other_corpus(run)
    again = Scorer(run.model, run.mesh)(run.variables, valid_batches(corpus.valid, 8, 2))
    np.testing.assert_array_equal(again.usage[0], visits)


def test_validation_takes_a_microbatch_at_a_time(texts, tmp_path, monkeypatch):
    """Where a step's rows do not fit on the devices at once, those of a validation do not either."""
    rows, put = [], sharding.put_batch
    monkeypatch.setattr(
        sharding, "put_batch", lambda batch, mesh: rows.append(len(batch)) or put(batch, mesh)
    )
    config = tiny_config(texts, steps=1, train__grad_accum_steps=4, train__eval_batches=2, train__probe=True)
    train(config, str(tmp_path), log=lambda _: None, bar=False)
    assert rows == [2] * 9  # a probe and twice four microbatches


def test_a_text_that_is_read_often_is_said_before_and_after(texts, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("0.txt", "1.txt"):
        shutil.copy(texts / name, tmp_path / "texts")
    log = []
    config = tiny_config(
        tmp_path / "texts", kind="narrow", steps=40, train__eval_every=20, train__checkpoint_every=0,
        data__valid_share=0.4,
    )  # fmt: skip
    metrics = train(config, str(tmp_path / "run"), log=log.append, bar=False)
    rows = json.loads((tmp_path / "run/data.json").read_text())["splits"]["train"]["rows"]
    assert metrics["passes"] == 40 * 8 / rows > 4
    said = [line for line in log if line.startswith("the training text")]
    times = f"read {metrics['passes']:.1f} times: beyond 4 times, other text teaches more"
    assert said == [f"the training text will be {times}", f"the training text was {times}"]
    assert log[-1] == said[1] and log.index(said[0]) == 2  # after the two lines of preparing
    valid = [line for line in lines(tmp_path / "run") if line["split"] == "valid"]
    np.testing.assert_allclose(
        [line["passes"] for line in valid], [8 * line["step"] / rows for line in valid]
    )


def test_without_the_probe(texts, tmp_path):
    metrics = quiet(tiny_config(texts, train__probe=False), tmp_path)
    assert "changed/0" in metrics and "working_units/0" not in metrics


def test_what_a_run_says(finished):
    _, metrics, log = finished
    assert metrics["passes"] < 1 and not any("training text" in line for line in log)
    said = {line.split("/6: loss ")[0]: line for line in log if "/6: loss " in line}
    assert (
        "dead leaves" in said["step 4"] and "dead leaves" not in said["step 2"]
    )  # the warm-up has two steps
    assert [line for line in log if "compiling" in line] == ["compiling the training step ..."]
    assert any(line.startswith("step 6: validation loss ") and "bits per byte" in line for line in log)


def test_a_finished_run_only_validates(texts, finished):
    workdir, metrics, _ = finished
    before = lines(workdir)
    again = quiet(tiny_config(texts), workdir)
    assert again["loss"] == metrics["loss"] and lines(workdir) == before


def test_restored_for_inference(finished):
    workdir, metrics, _ = finished
    run = restore_for_inference(str(workdir), "latest")
    assert run.model == tiny_model() and run.meta["step"] == 6
    assert run.config.optim.lr == 1e-3 and set(run.variables) == {"params", "routing"}
    with pytest.raises(InputError, match="step: 5 has no checkpoint"):
        restore_for_inference(str(workdir), 5)


def test_another_config_is_refused_and_nothing_changes(texts, finished):
    workdir, _, _ = finished
    unfinished = workdir / "checkpoints" / "7.orbax-checkpoint-tmp"  # another process is saving it
    (unfinished / "model").mkdir(parents=True)
    (unfinished / "model" / "part").write_text("so far")
    before = {path: path.is_file() and path.read_bytes() for path in workdir.rglob("*")}
    with pytest.raises(InputError, match="optim.lr"):
        quiet(tiny_config(texts, optim__lr=0.5), workdir)
    assert {path: path.is_file() and path.read_bytes() for path in workdir.rglob("*")} == before
    shutil.rmtree(unfinished)


def test_other_text_is_refused(texts, finished, tmp_path):
    workdir, _, _ = finished
    (tmp_path / "other.txt").write_text("some other words " * 300)
    (tmp_path / "more.txt").write_text("and more of them " * 300)
    with pytest.raises(InputError, match="trained on other data"):
        quiet(tiny_config(texts, data__files=f"{tmp_path}/*.txt"), workdir)


def test_sigterm_saves_and_the_run_goes_on(texts, finished, tmp_path):
    def stop_at_2(line):
        if line.startswith("step 2/6"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted, match="stopped by SIGTERM after step .* of 6; .* again to resume"
    ) as caught:
        quiet(tiny_config(texts), tmp_path, stop_at_2)
    assert caught.value.exit_code == 143
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert 2 <= checkpoints.latest <= 3
    log = []
    metrics = quiet(tiny_config(texts), tmp_path, log.append)
    assert metrics["loss"] == finished[1]["loss"]
    assert any(line.startswith("resumed at step") for line in log)


def test_a_stop_in_the_last_step_leaves_its_validation_to_the_next_start(texts, finished, tmp_path):
    def stop_at_5(line):  # what is said of a step is said in the next
        if line.startswith("step 5/6"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 6 of 6"):
        quiet(tiny_config(texts, train__log_every=1), tmp_path, stop_at_5)
    for _ in range(2):  # the second time nothing is left to do
        assert quiet(tiny_config(texts), tmp_path)["loss"] == finished[1]["loss"]
    assert [line["split"] for line in lines(tmp_path) if line["step"] == 6].count("valid") == 1
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest == 6 and checkpoints.is_scored(6)


def test_a_validation_that_a_stop_left_out_is_made_at_the_next_start(texts, finished, tmp_path):
    def stop_at_2(line):
        if line.startswith("step 2/6"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3 of 6"):
        quiet(tiny_config(texts, train__log_every=1), tmp_path, stop_at_2)
    quiet(tiny_config(texts), tmp_path)
    found = {line["step"]: line["loss"] for line in lines(tmp_path) if line["split"] == "valid"}
    assert found == {line["step"]: line["loss"] for line in lines(finished[0]) if line["split"] == "valid"}
    assert found.keys() == {3, 6}


def test_without_its_config_file_a_run_is_known_by_its_checkpoint(texts, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(InputError, match="optim.lr .*0.5 here"):
        quiet(tiny_config(texts, optim__lr=0.5), workdir)
    assert quiet(tiny_config(texts), workdir)["loss"] == finished[1]["loss"]


@pytest.mark.parametrize("signum", STOPS)
def test_what_ends_a_run_is_remembered(signum):
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signum)
            assert stop.received == signum
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_quits_at_once():
    # A shell's background job starts with SIGINT ignored; a terminal's does not, and this is about terminals.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_that_is_no_number_stops_before_saving(texts, tmp_path, monkeypatch):
    rate = optimizer.learning_rate

    def explodes_in_step_6(spec):
        return lambda count: jnp.where(count >= 5, jnp.inf, rate(spec)(count))

    monkeypatch.setattr(optimizer, "learning_rate", explodes_in_step_6)
    with pytest.raises(Diverged, match="step 6: update_norm is inf"):
        quiet(tiny_config(texts, optim__lr=1.5e-3), tmp_path)  # a rate whose step no other test compiles
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.steps == [3]
    run = restore_for_inference(str(tmp_path))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables))


@pytest.mark.parametrize("tokens,step,warned", [(8000, 3, True), (7999, 3, False), (8000, 2, False)])
@pytest.mark.parametrize("kind", ["tree", "leaf"])
def test_dead_leaves_are_said_only_when_they_can_be_known(texts, tmp_path, kind, tokens, step, warned):
    plan, log = plan_run(tiny_config(texts, kind, ffn__n_experts=8)), []
    usage = np.zeros((2, 2 if kind == "tree" else 1, 8), np.int32)
    usage[:, :, 0] = tokens  # layer 0 and 1: 7 of 8 leaves are dead
    with contextlib.closing(Report(str(tmp_path), plan, 1.0, 0, log.append, False)) as report:
        for _ in range(2):
            report.valid(
                step, Score(1.0, tokens, (usage,), (np.zeros((2, 4, 2), np.int32),)), None, write=False
            )
    warnings = [line for line in log if "left 88 % of its leaves without a visit" in line]
    assert len(warnings) == (2 if warned else 0)  # once a layer
    remedy = {"tree": "ffn.balance_rate=1e-3 or a smaller ffn.depth", "leaf": "a higher ffn.balance_rate"}
    assert all(f"{tokens:,} validation tokens; {remedy[kind]}" in line for line in warnings)


STRAIGHT = {"ffn__routing": "straight_through"}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"train__batch_size": 9, "mesh__data": 2}, "train.batch_size: 9 .* 2 devices"),
        (
            {"train__batch_size": 9, "train__grad_accum_steps": 2},
            "train.batch_size: 9 .* train.grad_accum_steps = 2",
        ),
        ({"mesh__data": 3, "mesh__model": 3}, "mesh: data=3, model=3 does not fit 8 devices"),
        ({"train__steps": 0}, "train.steps: 0 is not allowed"),
        ({"train__grad_sync": "layer"}, "train.grad_sync: 'layer'"),
        ({"train__log_every": 0}, "train.log_every: 0 is not allowed"),
        ({"seed": -1}, "seed: -1 is not allowed"),
        (
            {"optim__schedule": "step"},
            "optim.schedule: 'step' is not known; use one of: cosine, wsd, constant",
        ),
        ({"ffn__activation": "mish"}, "activation: 'mish' is not known; use one of: gelu"),
        (
            STRAIGHT | {"ffn__implementation": "grouped"},
            "ffn.implementation: 'grouped' .* 'masked' or 'auto'",
        ),
        (STRAIGHT | {"ffn__implementation": "gather"}, "ffn.implementation: 'gather' .* 'masked' or 'auto'"),
        ({"model__n_heads": 3}, "model.width: 32 is not allowed"),
        ({"data__tokenizer": "words"}, "words"),
    ],
)
def test_bad_values_are_refused_before_the_workdir_is_made(texts, tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        quiet(tiny_config(texts, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind,change",
    [
        ("tree", STRAIGHT | {"ffn__implementation": "masked"}),
        ("tree", STRAIGHT | {"ffn__implementation": "auto"}),
        ("tree", {"ffn__routing": "hard", "ffn__implementation": "grouped"}),
        (
            "random_tree",
            STRAIGHT | {"ffn__implementation": "grouped"},
        ),  # its routing is hard, whatever is said
        ("dense", STRAIGHT | {"ffn__implementation": "gather"}),
    ],
)
def test_implementations_that_can_train_are_allowed(texts, kind, change):
    assert plan_run(tiny_config(texts, kind, **change)).model.n_layers == 2


@pytest.mark.slow
def test_without_compiling(texts, tmp_path):
    sizes = {"model__n_layers": 1, "model__max_seq_len": 8, "ffn__depth": 1, "train__batch_size": 2}
    config = tiny_config(texts, steps=1, optim__warmup=0, **sizes)
    with jax.disable_jit():
        metrics = quiet(config, tmp_path)
    assert np.isfinite(metrics["loss"])
