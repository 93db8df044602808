"""The gradient of a step on meshes, in microbatches, added up either way, beside that of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import random_batch
from tree_ffn.models.spec import DenseSpec, ModelSpec
from tree_ffn.training import sharding, step
from tree_ffn.training.gradients import MULTIPLIED, gradients
from tree_ffn.training.optimizer import OptimSpec, make_optimizer
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec

LAYERS = (
    DenseSpec(32),
    TreeSpec(TreeShape(n_trees=8, depth=2)),
    TreeSpec(TreeShape(n_trees=2, depth=2, node_width=4), routing="straight_through"),  # E over both axes
    TreeSpec(TreeShape(n_trees=4, depth=2), router="frozen"),
    LeafSpec(n_experts=8, expert_width=4, top_k=3, gate_norm="rms", dense_start=0.2),
    LeafSpec(n_experts=8, expert_width=4, top_k=2, router="softmax"),
)
MODEL = ModelSpec(256, 16, 64, len(LAYERS), 8, LAYERS)
# Of path layers the one whose weights lie otherwise; tests/models/test_sharded.py has the others' gradients.
SHORT = ModelSpec(256, 16, 64, 4, 8, (LAYERS[0], LAYERS[2], *LAYERS[4:]))
BATCH = random_batch(rows=16, context=16) % 256


def init_of(model):
    return functools.partial(step.init_state, model=model, optimizer=make_optimizer(OptimSpec(steps=10)))


@functools.cache
def first_state(model):
    return jax.device_get(jax.jit(init_of(model))(jax.random.key(0)))


def state_of(model, mesh):
    state = first_state(model)
    return jax.device_put(state, sharding.shardings_for(state, mesh))


@functools.cache
def step_gradients(spec, data, model, microbatches=1, sync="step"):
    """(gradients, cross-entropy, visits) of BATCH."""
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        state = state_of(spec, mesh)

        def loss(params, rows):
            value, (nll, infos) = step.loss_fn(params, state.routing, rows, spec, jnp.float32(0.1))
            return value, (nll, step.count_usage(step.empty_usage(spec), infos))

        run = functools.partial(gradients, loss, dtype=jnp.float32, microbatches=microbatches, sync=sync)
        return jax.device_get(jax.jit(run)(state.params, sharding.put_batch(BATCH, mesh)))


@pytest.mark.parametrize(
    "spec, data, model, microbatches, sync",
    [
        pytest.param(SHORT, 4, 2, 2, "step", id="short"),
        *(
            pytest.param(MODEL, *mesh, *way, marks=pytest.mark.slow)
            for mesh in ((8, 1), (4, 2), (2, 4), (1, 8))
            for way in ((1, "step"), (2, "step"), (2, "microbatch"))
        ),
    ],
)
def test_gradients_are_those_of_one_device(spec, data, model, microbatches, sync):
    """Of every kind of layer, within float32's rounding; so is the loss, and every visit is counted once."""
    got, want = step_gradients(spec, data, model, microbatches, sync), step_gradients(spec, 1, 1)
    near = lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    jax.tree.map(near, got[:2], want[:2])
    jax.tree.map(np.testing.assert_array_equal, got[2], want[2])


def test_sums_are_in_float32_whatever_layers_multiply_in():
    """32 microbatches alike have the gradient of two; in bfloat16 each would add less to a growing sum."""
    model = ModelSpec(256, 16, 64, 1, 8, (DenseSpec(32),), dtype="bfloat16")
    mesh = sharding.make_mesh(2, 1)

    def loss(params, rows):
        value, (nll, _) = step.loss_fn(params, {}, rows, model)
        return value, (nll, ())

    def of_alike(microbatches):
        run = functools.partial(gradients, loss, dtype=jnp.bfloat16, microbatches=microbatches)
        rows = sharding.put_batch(np.repeat(BATCH[:2], microbatches, axis=0), mesh)
        return jax.device_get(jax.jit(run)(state_of(model, mesh).params, rows)[0])

    with jax.set_mesh(mesh):
        few, many = of_alike(2), of_alike(32)
    near = lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    jax.tree.map(near, many, few)


def test_what_is_gathered_in_the_layers_dtype_is_what_they_round_to_it(rng):
    """Rounding these weights first changes no bit of the loss. Others that are rounded are small."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    state = first_state(model)
    found, tree = jax.tree_util.tree_flatten_with_path(state.params)
    names = [sharding.path_name(path) for path, _ in found]
    leaves = [leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32) for _, leaf in found]

    @jax.jit
    def loss(leaves):
        params = jax.tree.unflatten(tree, leaves)
        return step.loss_fn(params, state.routing, BATCH[:4], model, jnp.float32(0.1))[1][0]

    exact, rounded = loss(leaves), lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32)
    of_one = lambda i: [rounded(leaf) if i == j else leaf for j, leaf in enumerate(leaves)]
    alike = {name for i, name in enumerate(names) if loss(of_one(i)) == exact}
    gathered = set(filter(MULTIPLIED.search, names))
    assert gathered <= alike
    assert {name.split("/", 1)[1] for name in alike - gathered} == {"attn/b_qkv", "attn/b_out", "ffn/b_out"}
