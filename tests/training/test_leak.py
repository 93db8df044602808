"""Leaks over a training: they fall by the step, reach every layer, and no validation has one."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import BATCH, one_step, start
from tests.training.tiny import tiny_model
from tree_ffn.models import Transformer
from tree_ffn.training import step
from tree_ffn.training.leak import with_leaks
from tree_ffn.training.losses import next_token_loss

PLAIN = {"ffn__routing": "straight_through"}
LEAKING = {**PLAIN, "ffn__leak": 0.5, "ffn__leak_share": 0.5}


def stepped(model, at):
    """The metrics of step `at` of a training of ten."""
    _, _, metrics = one_step(model, start(model)._replace(step=jnp.int32(at)), steps=10)
    return metrics


@pytest.mark.parametrize("layers", ["", "tree,dense"])
def test_a_step_trains_what_leaks_by_then(layers):
    model, plain = (tiny_model("tree", model__layers=layers, **more) for more in (LEAKING, PLAIN))
    variables = start(plain).variables
    for at, leak in ((0, 0.5), (3, 0.2), (5, 0.0), (9, 0.0)):
        leaks = {
            f"run_{i}": {"ffn": {"leak": jnp.full(length, leak)}}
            for i, (ffn, length) in enumerate(model.runs)
            if hasattr(ffn, "leak")
        }
        logits, _ = Transformer(plain).apply(variables | {"leak": leaks}, BATCH[:, :-1])
        want, _ = next_token_loss(logits, BATCH[:, 1:])
        np.testing.assert_allclose(stepped(model, at)["loss"], want, rtol=1e-6)
    hard = stepped(plain, 0)
    assert abs(stepped(model, 0)["loss"] - hard["loss"]) > 1e-4  # it is another function
    np.testing.assert_allclose(stepped(model, 5)["grad_norm"], hard["grad_norm"], rtol=1e-5)


def test_validations_have_no_leak():
    (loss, *_), (plain, *_) = (
        step.eval_step(start(model).variables, step.empty_usage(model), BATCH, model=model)
        for model in (tiny_model("tree", **LEAKING), tiny_model("tree", **PLAIN))
    )
    assert loss == plain


def test_models_without_a_leak_are_given_none():
    variables = {"params": {}, "routing": {}}
    for kind in ("tree", "moe", "dense"):
        assert with_leaks(variables, tiny_model(kind), jnp.float32(0)) == variables
