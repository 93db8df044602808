"""What the probe says of units, against the oracle's paths and plain loops over nodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.training.tiny import random_batch, tiny_model
from tree_ffn.models import Transformer
from tree_ffn.training import probe, step

BATCH = random_batch(rows=1)


@pytest.fixture(scope="module", params=["hard", "straight_through"])
def probed(request):
    """(model, variables, what probe says of its one run) of two layers of trees, W = 2 in the leaves."""
    model = tiny_model(ffn__routing=request.param, ffn__node_width=(1, 1, 1, 2))
    variables = jax.jit(Transformer(model).init)(jax.random.key(3), jnp.zeros((1, 32), jnp.int32))
    (found,) = jax.jit(functools.partial(probe.probe, model=model))(variables, BATCH)
    return model, variables, jax.device_get(found)


def layer_of(variables, layer):
    run = {**variables["params"]["run_0"]["ffn"], **variables["routing"]["run_0"]["ffn"]}
    return jax.tree.map(lambda leaf: leaf[layer], run)


def test_activity_is_that_of_the_oracles_paths(probed):
    model, variables, found = probed
    (spec, _), *_ = model.runs
    apply = jax.jit(functools.partial(Transformer(model).apply, mutable=["intermediates"]))
    _, sown = apply(variables, BATCH[:, :-1])
    (x,) = sown["intermediates"]["run_0"]["ffn"]["x"]
    for layer in (0, 1):
        paths = oracle.forward(oracle.to_float64(layer_of(variables, layer)), x[layer, 0], spec).paths
        peak, working = np.zeros(found["peak"].shape[1:]), np.zeros(found["peak"].shape[1:])
        for token in paths:
            for tree, steps in enumerate(token):
                for visit in steps:
                    h = np.abs(oracle.unit(spec, visit.z)[0])
                    rows = visit.rows
                    peak[tree, rows] = np.maximum(peak[tree, rows], h)
                    working[tree, rows] += (h > probe.WORKING) / len(paths)
        np.testing.assert_allclose(found["peak"][layer], peak, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["working"][layer], working, atol=1.5 / len(paths))
        metrics = probe.probe_metrics({name: array[layer : layer + 1] for name, array in found.items()})
        assert float(metrics["ever_working"][0]) == pytest.approx(
            np.mean(found["peak"][layer] > probe.WORKING)
        )
        assert 0 < float(metrics["working_units"][0]) <= spec.shape.active_units


def test_gradients_by_node(probed):
    model, variables, found = probed
    (spec, _), *_ = model.runs
    gradients = jax.jit(jax.grad(step.loss_fn, has_aux=True), static_argnums=3)
    grads, (_, infos) = gradients(variables["params"], variables["routing"], BATCH, model, 0.0)
    grads = jax.device_get(grads["run_0"]["ffn"])
    for layer in (0, 1):
        right, below = 0.0, 0.0
        for tree in range(spec.shape.n_trees):
            leaves = np.asarray(infos[0].leaf_TP)[layer, :, tree]
            visited = {(2**spec.shape.depth - 1 + leaf + 1 >> up) - 1 for leaf in leaves for up in range(4)}
            for node in range(spec.shape.n_nodes):
                rows = oracle.rows_of(spec, node)
                parts = [grads[name][layer, tree, rows].ravel() for name in ("w_in", "b_in")]
                parts.append(grads["w_out"][layer, tree, rows].ravel())
                norm = np.linalg.norm(np.concatenate(parts))
                np.testing.assert_allclose(found["gradient"][layer, tree, node], norm, rtol=1e-4, atol=1e-9)
                assert (norm > 0) == (node in visited)
                below += norm**2 * (node > 0)
                right += norm**2 * (node > 0 and node % 2 == 0)
        metrics = probe.probe_metrics({name: array[layer : layer + 1] for name, array in found.items()})
        assert float(metrics["gradient_right"][0]) == pytest.approx(right / below, rel=1e-3)


def test_other_layers_are_left_out():
    model = tiny_model(model__layers="dense,tree")
    variables = jax.jit(Transformer(model).init)(jax.random.key(0), jnp.zeros((1, 32), jnp.int32))
    nothing, found = jax.jit(functools.partial(probe.probe, model=model))(variables, BATCH)
    assert nothing is None and found["gradient"].shape == (1, 2, 15)
