"""The loss, accumulation, visit counts, and what changes which part of the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import random_batch, tiny_model
from tree_ffn.training import step
from tree_ffn.training.optimizer import OptimSpec, learning_rate, make_optimizer

OPTIM = OptimSpec(steps=10, lr=1e-2, schedule="constant")


def start(model):
    return step.init_state(jax.random.key(0), model, make_optimizer(OPTIM))


def one_step(model, state, batch, **options):
    run = functools.partial(
        step.train_step, model=model, optimizer=make_optimizer(OPTIM), schedule=learning_rate(OPTIM), **options
    )
    return jax.jit(run)(state, step.empty_usage(model), batch)


def test_loss_and_z_loss(rng):
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    targets = rng.integers(0, 5, (2, 3)).astype(np.int32)
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    nll = (total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
    plain, same = step.next_token_loss(logits, targets)
    again, with_z = step.next_token_loss(logits, targets, z_loss=0.5)
    np.testing.assert_allclose([plain, same, again], nll, rtol=1e-6)
    np.testing.assert_allclose(with_z, nll + 0.5 * (total**2).mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["tree", "dense"])
def test_microbatches_change_nothing(kind):
    model = tiny_model(kind, ffn__balance="sign")
    batch = random_batch()
    whole_state, whole_usage, whole = one_step(model, start(model), batch)
    state, usage, parts = one_step(model, start(model), batch, accumulation=4)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
    # Leaves are counted and thresholds moved over all tokens of the step.
    jax.tree.map(np.testing.assert_array_equal, usage, whole_usage)
    jax.tree.map(np.testing.assert_array_equal, state.routing, whole_state.routing)


def test_every_token_is_counted_once_per_tree():
    model, batch = tiny_model("tree"), random_batch()
    _, (counts,), _ = one_step(model, start(model), batch, accumulation=2)
    assert counts.shape == (2, 2, 8)
    np.testing.assert_array_equal(counts.sum(axis=-1), np.full((2, 2), 8 * 32))


def test_every_choice_of_an_expert_is_counted():
    model, batch = tiny_model("moe", ffn__top_k=2), random_batch()
    _, (counts,), _ = one_step(model, start(model), batch)
    np.testing.assert_array_equal(counts.sum(axis=-1), np.full((2, 1), 2 * 8 * 32))


def test_dense_layers_have_no_counts():
    assert step.empty_usage(tiny_model("narrow")) == (None,)


@pytest.mark.parametrize("balance,moves", [("none", False), ("sign", True)])
def test_only_balancing_moves_thresholds(balance, moves):
    model = tiny_model("tree", ffn__balance=balance)
    before = start(model)
    after, _, _ = one_step(model, before, random_batch())
    moved = [
        bool(np.any(new != old))
        for new, old in zip(jax.tree.leaves(after.routing), jax.tree.leaves(before.routing), strict=True)
    ]
    assert moved == [moves]
    assert int(after.step) == 1
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)}
    assert not any("threshold" in name for name in names)


def test_aux_loss_is_trained_on_but_not_reported():
    batch = random_batch()
    model = tiny_model("moe", ffn__moe_balance="aux", ffn__aux_weight=1.0)
    state = start(model)
    loss, (nll, infos) = step.loss_fn(state.params, state.routing, jnp.asarray(batch), model, 0.0)
    np.testing.assert_allclose(loss, nll + sum(info.aux_loss.sum() for info in infos), rtol=1e-6)
    assert loss > nll + 1.0  # two layers, each at least its balanced value of 1
    _, _, metrics = one_step(model, state, batch)
    np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-5)


def test_eval_step_is_the_training_loss_before_the_step():
    model, batch = tiny_model("tree"), random_batch()
    state = start(model)
    loss, usage = step.eval_step(state.variables, step.empty_usage(model), jnp.asarray(batch), model=model)
    _, train_usage, metrics = one_step(model, state, batch)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, usage, train_usage)
