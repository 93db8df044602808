"""The loss, accumulation, visit counts, and what changes which part of the state."""

import functools

import jax
import numpy as np
import optax
import pytest

from tests.training.tiny import random_batch, tiny_model
from tree_ffn.training import step
from tree_ffn.training.optimizer import OptimSpec, learning_rate, make_optimizer

OPTIM = OptimSpec(steps=10, lr=1e-2, schedule="constant")
BATCH = random_batch()


def start(model):
    init = functools.partial(step.init_state, model=model, optimizer=make_optimizer(OPTIM))
    return jax.jit(init)(jax.random.key(0))


def one_step(model, state, **options):
    run = functools.partial(
        step.train_step,
        model=model,
        optimizer=make_optimizer(OPTIM),
        schedule=learning_rate(OPTIM),
        **options,
    )
    return jax.jit(run)(state, step.empty_usage(model), BATCH)


@pytest.fixture(scope="module")
def trees():
    """A model of balanced trees, its first state, and what one step gives."""
    model = tiny_model("tree", ffn__balance_rate=1e-3)
    state = start(model)
    return model, state, one_step(model, state)


def test_microbatches_change_nothing(trees):
    model, before, (whole_state, whole_usage, whole) = trees
    state, usage, parts = one_step(model, before, accumulation=4)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
    # Leaves are counted and thresholds moved over all tokens of the step.
    jax.tree.map(np.testing.assert_array_equal, usage, whole_usage)
    jax.tree.map(np.testing.assert_array_equal, state.routing, whole_state.routing)


@pytest.mark.parametrize("router", ["tree", pytest.param("softmax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_microbatches_change_nothing_of_experts(router, accumulation):
    """Gradients, which Adam's first mean is of a first step; visits, selection bias."""
    n_trees = {"softmax": 1, "tree": 2}[router]
    model = tiny_model(
        "leaf", ffn__router=router, ffn__n_trees=n_trees, ffn__balance_rate=1e-2, ffn__dense_start=0.0
    )
    state = start(model)
    (whole, usage, metrics), (split, parts, same) = (
        one_step(model, state, accumulation=n) for n in (1, accumulation)
    )
    np.testing.assert_allclose(same["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, (usage, whole.routing), (parts, split.routing))
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    jax.tree.map(near, optax.tree.get(whole.opt_state, "mu"), optax.tree.get(split.opt_state, "mu"))


@pytest.mark.parametrize("kind", ["tree", "leaf", pytest.param("dense", marks=pytest.mark.slow)])
def test_rows_that_fill_up_a_batch_count_nowhere(kind):
    model = tiny_model(kind)
    state = start(model)
    run = jax.jit(functools.partial(step.eval_step, model=model))
    loss, usage, _ = run(state.variables, step.empty_usage(model), BATCH[:3])
    filled = np.concatenate([BATCH[:3], BATCH[5:]])
    again, counts, _ = run(state.variables, step.empty_usage(model), filled, np.int32(3))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, counts, usage)


def test_every_token_is_counted_once_per_tree(trees):
    _, _, (_, (counts,), _) = trees
    assert counts.shape == (2, 2, 8)
    np.testing.assert_array_equal(counts.sum(axis=-1), np.full((2, 2), BATCH[:, 1:].size))


def test_the_optimizer_does_not_know_thresholds(trees):
    model, before, (after, _, _) = trees
    old, new = (state.routing["run_0"]["ffn"]["threshold"] for state in (before, after))
    moves = np.unique(np.abs(np.asarray(new) - np.asarray(old)))
    rate = np.float32(model.ffns[0].balance_rate)
    assert rate in moves and set(moves) <= {np.float32(0), rate}  # balancing alone moved them
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)}
    assert not any("threshold" in name for name in names)
    assert int(after.step) == 1


def test_eval_step_is_the_training_loss_before_the_step(trees):
    model, before, (_, train_usage, metrics) = trees
    run = jax.jit(functools.partial(step.eval_step, model=model))
    loss, usage, leaves = run(before.variables, step.empty_usage(model), BATCH)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, usage, train_usage)
    assert [leaf.shape for leaf in leaves] == [(2, BATCH[:, 1:].size, 2)]
    for layer, tree in np.ndindex(2, 2):
        visits = np.bincount(leaves[0][layer, :, tree], minlength=8)
        np.testing.assert_array_equal(usage[0][layer, tree], visits)


def test_experts_are_counted():
    model = tiny_model("leaf")
    state = start(model)
    loss_fn = jax.jit(functools.partial(step.loss_fn, model=model))
    loss, (nll, infos) = loss_fn(state.params, state.routing, BATCH)
    assert loss == nll
    (counts,) = step.count_usage(step.empty_usage(model), infos)
    for layer in range(2):  # three of each token
        visits = np.bincount(np.ravel(infos[0].leaf_TP[layer]), minlength=model.ffns[0].n_experts)
        np.testing.assert_array_equal(counts[layer, 0], visits)
        assert visits.sum() == 3 * BATCH[:, 1:].size
