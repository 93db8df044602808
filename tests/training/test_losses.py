"""The loss and its derivative, against float64."""

import jax
import numpy as np
import pytest

from tests.training.tiny import random_batch, tiny_model
from tree_ffn.models.transformer import Transformer
from tree_ffn.training import losses


@pytest.fixture
def scores(rng):
    """float32 logits [2, 3, 5] and targets."""
    return rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3)).astype(np.int32)


def mean_loss(logits, targets):
    return losses.token_losses(logits, targets).mean()


def test_loss(scores):
    logits, targets = scores
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    nll = (total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
    np.testing.assert_allclose(mean_loss(logits, targets), nll, rtol=1e-6)


def test_derivative(scores):
    logits, targets = scores
    exp = np.exp(logits.astype(np.float64))
    softmax = exp / exp.sum(-1, keepdims=True)
    wanted = (softmax - np.eye(5)[targets]) / targets.size
    got = jax.grad(mean_loss)(logits, targets)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)


def loss_of(params, variables, batch, model):
    return losses.next_token_loss(model, {**variables, "params": params}, batch)[0]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolling_the_layers_changes_nothing(remat, jit_as_users):
    batch, results = random_batch(), []
    grad = jax.jit(jax.value_and_grad(loss_of), static_argnames="model")
    for unroll in (1, 12):
        model = tiny_model("tree", model__unroll=unroll, model__remat=remat)
        variables = jit_as_users(Transformer(model).init)(jax.random.key(0), batch[:, :-1])
        results.append((variables, grad(variables["params"], variables, batch, model=model)))
    (looped, expected), (unrolled, got) = results
    jax.tree.map(np.testing.assert_array_equal, looped, unrolled)  # the same parameters, stacked alike
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, got)
