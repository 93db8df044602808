"""The loss and its derivative, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import random_batch, tiny_model
from tree_ffn.models.transformer import Transformer, logits_of
from tree_ffn.training import losses


@pytest.fixture
def scores(rng):
    """float32 logits [2, 3, 5] and targets."""
    return rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3)).astype(np.int32)


def test_loss(scores):
    logits, targets = scores
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    nll = (total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
    np.testing.assert_allclose(losses.next_token_loss(logits, targets), nll, rtol=1e-6)


def test_derivative(scores):
    logits, targets = scores
    exp = np.exp(logits.astype(np.float64))
    softmax = exp / exp.sum(-1, keepdims=True)
    wanted = (softmax - np.eye(5)[targets]) / targets.size
    got = jax.grad(losses.next_token_loss)(logits, targets)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)


def loss_of(params, variables, batch, model, padded=True):
    """Training loss of a batch; with the table's spare rows, or from the model's own scores."""
    scores, _ = Transformer(model).apply({**variables, "params": params}, batch[:, :-1], states=padded)
    logits = logits_of(model, params, scores) if padded else scores
    assert logits.shape[-1] == (model.vocab_rows if padded else model.vocab_size)
    return losses.next_token_loss(logits, batch[:, 1:])


def test_rows_beyond_the_vocabulary_weigh_nothing():
    model, batch = tiny_model("tree", model__vocab_multiple=64), random_batch()
    assert model.vocab_rows > model.vocab_size
    variables = jax.jit(Transformer(model).init)(jax.random.key(0), batch[:, :-1])
    grad = jax.jit(jax.value_and_grad(loss_of), static_argnames=("model", "padded"))
    plain, padded = (
        grad(variables["params"], variables, batch, model=model, padded=padded) for padded in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), plain, padded)
    assert not jnp.any(padded[1]["embed"]["tokens"][model.vocab_size :])


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
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
