"""Leaks over a training: they fall by the step, reach every layer, and no validation has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import BATCH, one_step, start
from tests.training.tiny import tiny_model
from tree_ffn.errors import InputError
from tree_ffn.models import Transformer
from tree_ffn.training import step
from tree_ffn.training.leak import with_leaks
from tree_ffn.training.losses import next_token_loss
from tree_ffn.training.setup import check_trainable

PLAIN = {"ffn__routing": "straight_through"}
LEAKING = {**PLAIN, "ffn__leak": 1.0, "ffn__leak_share": 0.5}


def metrics_of_steps(model):
    """A function: the metrics of any step of a training of ten, all from the first weights; compiled once."""
    state, run = start(model), jax.jit(lambda state: one_step(model, state, steps=10)[2])
    return lambda at: run(state._replace(step=jnp.int32(at)))


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param("", marks=pytest.mark.slow, id="tree"),
        "tree,leaf",
        pytest.param("moe,hash", marks=pytest.mark.slow),
    ],
)
def test_a_step_trains_what_leaks_by_then(layers):
    model, plain = (tiny_model("tree", model__layers=layers, **more) for more in (LEAKING, PLAIN))
    variables, leaking = start(plain).variables, metrics_of_steps(model)
    for at, leak in ((0, 1.0), (3, 0.4), (5, 0.0), (9, 0.0)):
        leaks = {
            f"run_{i}": {"ffn": {"leak": jnp.full(length, leak)}}
            for i, (ffn, length) in enumerate(model.runs)
            if hasattr(ffn, "leak")
        }
        logits, _ = Transformer(plain).apply(variables | {"leak": leaks}, BATCH[:, :-1])
        want = next_token_loss(logits, BATCH[:, 1:])
        np.testing.assert_allclose(leaking(at)["loss"], want, rtol=1e-6)
    hard = metrics_of_steps(plain)(0)
    assert abs(leaking(0)["loss"] - hard["loss"]) > 1e-4  # it is another function
    np.testing.assert_allclose(leaking(5)["grad_norm"], hard["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("layers", ["", "moe,leaf"])
def test_validations_have_no_leak(layers):
    (loss, *_), (plain, *_) = (
        step.eval_step(start(model).variables, step.empty_usage(model), BATCH, model=model)
        for model in (tiny_model("tree", model__layers=layers, **more) for more in (LEAKING, PLAIN))
    )
    assert loss == plain


def test_models_without_a_leak_are_given_none():
    variables = {"params": {}, "routing": {}}
    for kind in ("tree", "moe", "hash", "dense"):
        assert with_leaks(variables, tiny_model(kind), jnp.float32(0)) == variables


def test_experts_leak_whatever_execution_is_named_for_trees():
    leaking = {"ffn__routing": "hard", "ffn__leak": 0.5, "ffn__implementation": "grouped"}
    check_trainable(tiny_model("tree", model__layers="moe,hash", **leaking))
    with pytest.raises(InputError, match="'grouped' cannot train ffn.leak"):
        check_trainable(tiny_model("tree", model__layers="moe,tree", **leaking))
    with pytest.raises(InputError, match="'gather' cannot train ffn.leak"):
        check_trainable(tiny_model("leaf", ffn__leak=1.0, ffn__implementation="gather"))
