"""The program: what it refuses and how, what it prints, how it stops."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tests.training.tiny import tiny_config, tiny_model
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.plan import prepare_data
from tree_ffn.tree import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def options(texts, monkeypatch):
    """A command line that trains in seconds."""
    monkeypatch.chdir(ROOT)
    data = {"files": f"{texts}/*.txt", "cache_dir": f"{texts}/cache"}
    overrides = [f"--config.data.{name}={value}" for name, value in data.items()]
    return ["--config=configs/smoke.py", "--config.data.workers=0", "--config.mesh.data=1", *overrides]


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([], "--config is missing; name a file, e.g. --config=configs/quickstart.py."),
        (["--config=configs/smoke.py"], "--workdir is missing"),
        (["--config=configs/nowhere.py", "--workdir=x"], "--config: 'configs/nowhere.py' is no config file"),
        (["--config=configs", "--workdir=x"], "--config: 'configs' is no config file; name one that is"),
        (["--config=README.md", "--workdir=x"], "--config: 'README.md' is no config file"),
        (["--config=configs/smoke.py:stesp=4", "--workdir=x"], "config argument: 'stesp=4' is not known"),
        (["--config=configs/smoke.py:steps=four", "--workdir=x"], "steps=four is not allowed"),
        (
            ["--config=configs/smoke.py", "--wordkir=x"],
            "Unknown command line flag 'wordkir'. Did you mean: workdir",
        ),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--config.optim.lrr=1"],
            "--config.optim.lrr is no key of the config; the nearest is optim.lr.",
        ),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--config.train.steps=many"],
            "--config.train.steps: 'many' is not allowed; use a number.",
        ),
        (["--config=configs/smoke.py", "--workdir=x", "--heartbeat=0"], "--heartbeat: 0 is not allowed"),
        (["--config=configs/smoke.py", "--workdir=x", "--describe=perhaps"], "describe"),
        (["--config=configs/smoke.py", "--workdir=x", "more"], "argument: 'more' is not known"),
        (["--config=configs/smoke.py", "--workdir=x", "--results=y"], "--row is missing"),
        (["--config=configs/smoke.py", "--workdir=x", "--results=y", "--row=a b"], "--row: 'a b' is not"),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--texts=a=absent.txt"],
            "--texts: 'absent.txt' matches",
        ),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--config.ffn.kind=maple"],
            "ffn.kind: 'maple' is not known",
        ),
        (["--config=configs/smoke.py", "--workdir=x", "--config.data.corpus=books"], "data.corpus: 'books'"),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--config.data.files=a", "--config.data.tfds_dir=b"],
            "data.tfds_dir: 'b' needs data.corpus='tfds'; data.corpus is 'files'.",
        ),
        (
            ["--config=configs/smoke.py", "--workdir=x", "--config.data.valid_files=a"],
            "data.valid_files: 'a' needs data.corpus='files'; data.corpus is 'python_stdlib'.",
        ),
        (["--config=configs/smoke.py", "--workdir=x", "--config.train.batch_size=0"], "train.batch_size: 0"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(monkeypatch, arguments, said):
    monkeypatch.chdir(ROOT)
    outcome = call("train", *arguments)
    assert outcome.code == 2 and outcome.out == ""
    assert said in outcome.err and re.fullmatch(r"train\.py: [^\n]+\n", outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("workdir", ["{file}/run", "/proc/run"])
def test_an_unwritable_workdir(options, tmp_path, workdir):
    (tmp_path / "file").touch()
    outcome = call("train", *options, f"--workdir={workdir.format(file=tmp_path / 'file')}")
    assert outcome.code == 2 and "cannot be written" in outcome.err and outcome.err.count("\n") == 1


def files_of(directory):
    """Content and time of every file: {path: (bytes, ns)}."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    "content,said",
    [
        (b"latin \xe9 text", "bad.txt: byte 6 is not UTF-8"),
        (b"", "data: the corpus is empty; use files that hold text."),
        (None, "bad.txt' matches no file"),
    ],
)
def test_text_that_cannot_be_used(options, texts, tmp_path, content, said):
    prepared = prepare_data(tiny_config(texts, data__cache_dir=f"{tmp_path}/cache"), tiny_model()).directory
    before = files_of(prepared)
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    data = [f"--config.data.files={tmp_path}/bad.txt", f"--config.data.cache_dir={tmp_path}/cache"]
    outcome = call("train", *options, *data, f"--workdir={tmp_path}/run")
    assert outcome.code == 2 and said in outcome.err
    assert re.fullmatch(r"train\.py: [^\n]+\n", outcome.err), outcome.err
    assert before and files_of(prepared) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data,said",
    [
        ("tfds_dir=/nowhere", "/nowhere"),
        ("tfds_name=no_such_set", "no_such_set"),
        ("files=/nowhere/*", "/nowhere/*"),
    ],
)
def test_refused_data_leave_no_workdir(monkeypatch, tmp_path, data, said):
    monkeypatch.chdir(ROOT)
    cache = f"--config.data.cache_dir={tmp_path}/cache"
    command = ["--config=configs/smoke.py", "--config.mesh.data=1", f"--config.data.{data}", cache]
    outcome = call("train", *command, f"--workdir={tmp_path}/runs/a")
    assert outcome.code == 2 and said in outcome.err, outcome.err
    assert not (tmp_path / "runs" / "a").exists()
    (tmp_path / "there").mkdir()
    assert call("train", *command, f"--workdir={tmp_path}/there").code == 2
    assert list((tmp_path / "there").iterdir()) == []


def test_a_damaged_description_of_prepared_rows(options, texts, tmp_path):
    prepared = prepare_data(tiny_config(texts, data__cache_dir=f"{tmp_path}/cache"), tiny_model()).directory
    (prepared / "meta.json").write_text("{}")
    cache = f"--config.data.cache_dir={tmp_path}/cache"
    outcome = call("train", *options, cache, f"--workdir={tmp_path}/run")
    assert outcome.code == 2 and "meta.json: has no corpus; delete its directory" in outcome.err
    assert re.fullmatch(r"train\.py: [^\n]+\n", outcome.err), outcome.err


def test_train_record_and_go_on(options, texts, tmp_path):
    results, workdir = tmp_path / "results.jsonl", tmp_path / "run"
    command = [*options, f"--workdir={workdir}", f"--results={results}", "--row=leaf_X8_K3"]
    outcome = call("train", *command)
    assert outcome.code == 0, outcome.err
    assert "step 6: validation loss" in outcome.out
    rows = {row["metric"]: row for row in load_results(str(results))}
    assert {"val_loss", "ppl", "bits_per_byte", "active_share", "dead_leaves", "tokens_per_s"} <= rows.keys()
    assert rows["val_loss"]["config"]["data"]["corpus"] == texts.name
    assert json.loads((workdir / "config.json").read_text())["data"]["corpus"] == "files"
    assert rows["val_loss"]["config"]["data"]["sha256"] and str(tmp_path) not in results.read_text()
    assert rows["val_loss"]["command"].startswith("python -m experiments.train --config=configs/smoke.py")

    (start,) = json.loads((workdir / "origin.json").read_text())["starts"]
    assert start["step"] == 0 and start["command"] == rows["val_loss"]["command"]
    assert start["versions"]["jax"] and start["commit"] and start["device"] == "cpu"

    # A corpus that is named is the same as one that follows from data.files.
    other = ["--config.data.corpus=files", "--config.optim.lr=0.5"]
    refused = call("train", *options, *other, f"--workdir={workdir}")
    assert refused.code == 2 and "differ: optim.lr (0.001 there, 0.5 here);" in refused.err
    assert len(json.loads((workdir / "origin.json").read_text())["starts"]) == 1  # it did not start


def test_a_checkpoint_of_another_shape(options, tmp_path):
    assert call("train", *options, f"--workdir={tmp_path}").code == 0
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = call("train", *options, f"--workdir={tmp_path}", "--config.model.width=64")
    assert outcome.code == 2 and "params/embed/positions" in outcome.err and "float32[32,64]" in outcome.err


def test_divergence_exits_with_1_and_names_the_step(options, tmp_path):
    wild = ["--config.optim.lr=1e30", "--config.optim.clip_norm=0.0", "--config.train.checkpoint_every=1"]
    outcome = call("train", *options, *wild, f"--workdir={tmp_path}")
    assert outcome.code == 1 and re.search(r"train\.py: step \d: .* is (nan|inf)", outcome.err), outcome.err


def test_describe(monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = call("train", "--config=configs/default.py:preset=opt_6.7b", "--describe")
    assert outcome.code == 0 and "active" in outcome.out and outcome.err == ""


def test_help_teaches(monkeypatch):
    outcome = call("train", "--help")
    assert "python -m experiments.train --config=configs/quickstart.py" in outcome.out
    assert "--workdir" in outcome.out and "--nojit" in outcome.out


def test_sigterm_saves_exits_143_and_says_how_to_resume(options, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *options, "--config.train.steps=100000"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    stopped = re.search(r"stopped by SIGTERM after step (\d+) of 100000; .*run the same command again", err)
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest == int(stopped[1])


@pytest.mark.slow
def test_nojit_shows_numbers(options, tmp_path, monkeypatch):
    # Every operation is compiled alone, once a shape: with few shapes that takes seconds.
    eight = "model.width model.max_seq_len train.batch_size ffn.node_width"
    one = "model.n_layers model.n_heads ffn.n_trees ffn.depth train.steps train.eval_batches"
    plain = {
        "ffn.routing": "hard",
        "ffn.implementation": "masked",
        "train.probe": False,
        "optim.clip_norm": 0.0,
    }
    plain |= dict.fromkeys(eight.split(), 8) | dict.fromkeys(one.split(), 1) | {"optim.warmup_steps": 0}
    overrides = [f"--config.{name}={value}" for name, value in plain.items()]
    seen, trees = [], IMPLEMENTATIONS["masked"]

    def look(params, x_TE, *rest):
        if not isinstance(x_TE, jax.core.Tracer):
            seen.append(np.asarray(x_TE))
        return trees(params, x_TE, *rest)

    monkeypatch.setitem(IMPLEMENTATIONS, "masked", look)
    try:
        outcome = call("train", *options, *overrides, "--nojit", f"--workdir={tmp_path}")
    finally:
        jax.config.update("jax_disable_jit", False)
    assert outcome.code == 0 and "step 1: validation loss" in outcome.out, outcome.err
    assert (64, 8) in {x.shape for x in seen} and all(np.isfinite(x).all() for x in seen)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(options, texts, tmp_path):
    prepare_data(tiny_config(texts), tiny_model())  # so that it is the first checkpoint that does not fit
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    start = f"{limit} runpy.run_module('experiments.train', run_name='__main__')"
    outcome = subprocess.run(
        [sys.executable, "-c", start, *options, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}, text=True,
    )  # fmt: skip
    assert outcome.returncode == 2, outcome.stderr
    assert "checkpoints cannot be written (File too large)" in outcome.stderr.splitlines()[-1]


def test_texts_are_scored_at_the_end(options, texts, tmp_path):
    results = [tmp_path / name for name in ("trained.jsonl", "evaluated.jsonl")]
    other = f"--texts=some={texts}/[0-2].txt"
    names = ["--row=a_row", "--table=t1_small"]
    outcome = call("train", *options, f"--workdir={tmp_path}/run", f"--results={results[0]}", other, *names)
    assert outcome.code == 0 and "some: loss " in outcome.out, outcome.err
    arguments = [f"--workdir={tmp_path}/run", "--step=latest", f"--results={results[1]}", other, *names]
    assert call("evaluate", *arguments).code == 0
    trained, evaluated = ({row["metric"]: row for row in load_results(str(path))} for path in results)
    for name in ("some_loss", "some_bits_per_byte", "some_nats_per_word", "some_word_ppl"):
        assert trained[name]["value"] == pytest.approx(evaluated[name]["value"], rel=1e-5)
        assert trained[name]["config_hash"] == evaluated[name]["config_hash"]
        assert "experiments.train" in trained[name]["command"]
    assert "val_loss" in trained
