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
from tree_ffn.training.losses import token_losses
from tree_ffn.training.plan import check_trainable
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


@pytest.mark.parametrize("implementation", ["gather", "grouped"])
def test_a_dense_start_needs_all_experts(implementation):
    check_trainable(tiny_model("leaf", ffn__implementation=implementation, **PLAIN))
    with pytest.raises(InputError, match=f"'{implementation}' cannot train ffn.dense_start"):
        check_trainable(tiny_model("leaf", ffn__implementation=implementation, **LEAKING))
