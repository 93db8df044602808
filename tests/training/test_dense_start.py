"""Leaks over a training: they fall by the step, reach every layer, and no validation has one."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import BATCH, one_step, start
from tests.training.tiny import tiny_config, tiny_model
from tree_ffn.models import Transformer
from tree_ffn.training import compiled, step
from tree_ffn.training.compiled import compile_programs
from tree_ffn.training.loop import train
from tree_ffn.training.losses import token_losses
from tree_ffn.training.plan import plan_run
from tree_ffn.training.signals import Interrupted
from tree_ffn.training.step import with_leaks
from tree_ffn.tree import LeafSpec

PLAIN, LEAKING = {"ffn__dense_start": 0.0}, {"ffn__dense_start": 0.5}


def metrics_of_steps(model):
    """A function: the metrics of any step of a training of ten, all from the first weights; compiled once."""
    state, run = start(model), jax.jit(lambda state: one_step(model, state, steps=10)[2])
    return lambda at: run(state._replace(step=jnp.int32(at)))


@pytest.mark.parametrize("layers", ["", pytest.param("tree,leaf", marks=pytest.mark.slow)])
def test_a_step_trains_what_leaks_by_then(layers):
    model, plain = (tiny_model("leaf", model__layers=layers, **more) for more in (LEAKING, PLAIN))
    variables, leaking = start(plain).variables, metrics_of_steps(model)
    apply = jax.jit(lambda leaks: Transformer(plain).apply(variables | {"leak": leaks}, BATCH[:, :-1])[0])
    for at, leak in ((0, 1.0), (3, 0.4), (5, 0.0), (9, 0.0)):
        leaks = {
            f"run_{i}": {"ffn": {"leak": jnp.full(length, leak)}}
            for i, (ffn, length) in enumerate(model.runs)
            if isinstance(ffn, LeafSpec)
        }
        want = token_losses(apply(leaks), BATCH[:, 1:]).mean()
        np.testing.assert_allclose(leaking(at)["loss"], want, rtol=1e-6)
    hard = metrics_of_steps(plain)(0)
    assert abs(leaking(0)["loss"] - hard["loss"]) > 1e-4  # it is another function
    np.testing.assert_allclose(leaking(5)["grad_norm"], hard["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("layers", ["tree,leaf", pytest.param("", marks=pytest.mark.slow)])
def test_validations_have_no_leak(layers):
    score = jax.jit(step.eval_step, static_argnames="model")
    (loss, *_), (plain, *_) = (
        score(start(model).variables, step.empty_usage(model), BATCH, model=model)
        for model in (tiny_model("leaf", model__layers=layers, **more) for more in (LEAKING, PLAIN))
    )
    assert loss == plain


def test_models_without_a_leak_are_given_none():
    variables = {"params": {}, "routing": {}}
    for kind in ("tree", "leaf", "dense"):
        assert with_leaks(variables, tiny_model(kind, **PLAIN), jnp.float32(0)) == variables


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """(workdir, metrics of every step, lines of the log) of a run by `masked` and of one by `grouped`."""
    done = {}
    for implementation in ("masked", "grouped"):
        workdir, log = tmp_path_factory.mktemp(implementation), []
        config = tiny_config(texts, "leaf", **LEAKING, ffn__implementation=implementation, train__log_every=1)
        train(config, str(workdir), log=log.append, bar=False)
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        done[implementation] = workdir, [line for line in lines if line["split"] == "train"], log
    return done


def test_after_the_start_training_computes_the_chosen_experts_alone(runs):
    (_, masked, plain_log), (_, grouped, log) = runs["masked"], runs["grouped"]
    assert [line["step"] for line in grouped] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[key] for line in grouped], [line[key] for line in masked], rtol=1e-4, err_msg=key
        )
    said = "the dense start is over: compiling a training step of the chosen experts alone ..."
    assert sum(said in line for line in log) == 1 and not any(said in line for line in plain_log)


def test_a_run_goes_on_after_its_start(runs, texts, tmp_path):
    """The first process stops in the start, the second after it: what is computed is the same."""
    *_, whole = runs["grouped"][1]
    for stop in (2, 4):
        config = tiny_config(texts, "leaf", **LEAKING, ffn__implementation="grouped", train__log_every=1)
        with pytest.raises(Interrupted):
            train(config, str(tmp_path), log=lambda _: None, bar=False, compile=stopping_after(stop))
    train(config, str(tmp_path), log=lambda _: None, bar=False)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    *_, last = (line for line in lines if line["split"] == "train")
    assert (last["step"], last["loss"]) == (6, whole["loss"])


def stopping_after(stop: int):
    """Programs with which a run gets SIGTERM while it takes the step after `stop` finished ones."""

    def compile(plan):
        programs = compile_programs(plan)

        def watched(train_step):
            def step(state, usage, batch):
                if int(state.step) == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return train_step(state, usage, batch)

            return step

        assert programs.late is not None
        late = programs.late._replace(train_step=watched(programs.late.train_step))
        return programs._replace(train_step=watched(programs.train_step), late=late)

    return compile


@pytest.mark.parametrize(
    "changes, late",
    [
        (LEAKING, False),  # few tokens: masked is the fastest
        (LEAKING | {"ffn__implementation": "masked"}, False),
        (LEAKING | {"ffn__implementation": "gather"}, True),
        (PLAIN | {"ffn__implementation": "grouped"}, False),
        (LEAKING | {"train__batch_size": 512}, True),  # 16,384 tokens: grouped is the fastest
    ],
)
def test_a_second_program_is_compiled_where_it_is_another(texts, changes, late):
    plan = plan_run(tiny_config(texts, "leaf", **changes))
    early, over = compiled.phases(plan)
    assert (over == plan.model.after_start) if late else over is None
    assert early.ffns == plan.model.ffns
    assert early.implementation == (
        changes.get("ffn__implementation") if changes["ffn__dense_start"] == 0 else None
    )


@pytest.mark.parametrize("share, steps, first", [(0.5, 6, 3), (0.2, 1831, 367), (1.0, 7, 7), (0.01, 10, 1)])
def test_the_second_program_begins_where_nothing_leaks(texts, share, steps, first):
    plan = plan_run(tiny_config(texts, "leaf", steps, ffn__dense_start=share))
    assert compiled.first_after_start(plan) == first
    [ffn, *_] = plan.model.ffns
    assert isinstance(ffn, LeafSpec)
    assert ffn.leak_at(first / steps) == 0 < ffn.leak_at((first - 1) / steps)
