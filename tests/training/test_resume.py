"""A run that was killed ends exactly where one that was not killed ends."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.training import child
from tests.training.tiny import random_batch, tiny_config
from tree_ffn.training import step
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.loop import train
from tree_ffn.training.plan import plan_run
from tree_ffn.training.restore import restore_for_inference

ROOT = pathlib.Path(__file__).parent.parent.parent
OPTIONS = {
    "steps": 9,
    "ffn__balance_rate": 1e-3,
    "model__layers": "tree,leaf",
    "ffn__top_k": 2,
    "ffn__dense_start": 0.5,
    "train__grad_accum_steps": 2,
    "train__log_every": 1,
    "train__keep": 9,
}


def run(texts, workdir):
    workdir.mkdir(exist_ok=True)
    child.main(str(texts), str(workdir), **OPTIONS)


def run_killed(texts, workdir, before: int) -> int:
    """Exit status of a training process that kills itself before a step; it finds what this one compiled."""
    workdir.mkdir()
    options = {"texts": str(texts), "workdir": str(workdir), "kill_before": before} | OPTIONS
    command = [sys.executable, "-m", "tests.training.child", json.dumps(options)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300).returncode


def state_of(texts, workdir):
    """The last state in a workdir."""
    abstract = compile_programs(plan_run(tiny_config(texts, **OPTIONS))).abstract
    with Checkpoints(str(workdir)) as checkpoints:
        return checkpoints.restore(abstract)[0]


def hashes(state) -> dict[str, str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest() for path, leaf in flat}


def losses(workdir) -> dict[tuple, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {(line["split"], line["step"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory):
    """The workdir of a run of 9 steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("straight")
    run(texts, workdir)
    return workdir


def test_killed_and_resumed_is_the_straight_run(texts, straight, tmp_path):
    workdir = tmp_path / "killed"
    # Checkpoints are begun after steps 3, 6 and 9; that of step 6 may not be whole when it happens.
    assert run_killed(texts, workdir, before=8) == -signal.SIGKILL
    with Checkpoints(str(workdir)) as checkpoints:
        start = checkpoints.latest
    assert start in (3, 6)
    run(texts, workdir)

    batches = (straight / "batches.txt").read_text().split()
    killed = (workdir / "batches.txt").read_text().split()
    assert killed == batches[:7] + batches[start:]
    assert losses(workdir) == losses(straight)
    usage = lambda run: {path.name: path.read_bytes() for path in (run / "usage").iterdir()}
    assert usage(workdir) == usage(straight) and len(usage(straight)) == 6
    expected = hashes(state_of(texts, straight))
    assert hashes(state_of(texts, workdir)) == expected
    assert all(any(part in name for name in expected) for part in ("threshold", "selection_bias", "mu"))


ELSEWHERE = {
    "in four microbatches": {"train__grad_accum_steps": 4},
    "on four devices": {"mesh__data": 2, "mesh__model": 2},
}


@pytest.mark.slow  # that microbatches and devices change nothing, test_step and test_gradients show of a step
@pytest.mark.parametrize("name", ELSEWHERE)
def test_resumed_elsewhere(name, texts, straight, tmp_path, record_property):
    workdir = tmp_path / "other"
    shutil.copytree(straight, workdir)
    for later in (6, 9):
        shutil.rmtree(workdir / "checkpoints" / str(later), ignore_errors=True)
    with Checkpoints(str(workdir)) as checkpoints:
        assert checkpoints.latest == 3
    config = tiny_config(texts, **OPTIONS | ELSEWHERE[name])
    train(config, str(workdir), log=lambda _: None, bar=False)

    ours, expected = losses(workdir), losses(straight)
    assert ours.keys() == expected.keys()
    for name, margin in decision_margins(workdir).items():
        record_property(name, margin)  # in the report of --junitxml
        print(f"{name}: {margin}")  # with -s, and where the next line fails
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), rtol=2e-4)


def decision_margins(workdir) -> dict[str, float]:
    """How many tokens would take another path if every decision logit were moved by so much."""
    run = restore_for_inference(str(workdir), "latest")
    scored = jax.jit(functools.partial(step.loss_fn, model=run.model))

    def leaves(shift):
        routing = jax.tree.map(lambda threshold: threshold + shift, run.variables["routing"])
        _, (_, infos) = scored(run.variables["params"], routing, random_batch())
        return np.asarray(infos[0].leaf_TP)

    still = leaves(0.0)
    return {
        f"share of paths within {size:g} of a decision": float(
            np.mean((leaves(size) != still) | (leaves(-size) != still))
        )
        for size in (1e-6, 1e-4, 1e-2)
    }
