"""A layer of trees on 8 devices: the same outputs, leaves and gradients as on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.models.kinds import random_leaves
from tree_ffn.models.sharded import sharded_tree_ffn
from tree_ffn.tree import PrunedSpec, TreeShape, TreeSpec, tree_ffn
from tree_ffn.tree.path import init_params
from tree_ffn.tree.path.pruned import STRUCTURE, init_structure

E, T = 8, 24

FOUR_TREES = TreeSpec(TreeShape(n_trees=4, depth=2, node_width=2))
ONE_TREE = TreeSpec(TreeShape(n_trees=1, depth=2, node_width=(1, 2, 3)))
PRUNED_TREES = PrunedSpec(FOUR_TREES.shape, nodes=(4, 6, 9))

CASES = [
    # spec, (data, model), implementation, tokens
    (FOUR_TREES, (2, 4), "masked", T),  # trees over model
    (dataclasses.replace(FOUR_TREES, act_site="sum"), (2, 4), "gather", T),  # activation after the joined sum
    (dataclasses.replace(FOUR_TREES, router="frozen"), (4, 2), "masked", T),
    (dataclasses.replace(FOUR_TREES, routing="straight_through"), (1, 4), "masked", T),
    (FOUR_TREES, (8, 1), "masked", T),  # tokens over data alone
    (ONE_TREE, (4, 2), "grouped", T),  # one tree: tokens over both axes
    (ONE_TREE, (4, 2), "gather", 4),  # 4 tokens split over data only
    (ONE_TREE, (2, 4), "masked", 3),  # 3 tokens split over nothing
    (PRUNED_TREES, (2, 4), "grouped", T),  # pruned trees differ in size: tokens over both axes
    (PRUNED_TREES, (2, 4), "gather", 4),
]


@functools.cache
def case(spec, implementation, n_tokens):
    """A function of a layer: ((output, leaves), gradients); and what it gives for the layer on one device."""
    params = random_leaves(jax.eval_shape(lambda key: init_params(key, spec, E), jax.random.key(0)))
    x_TE = jnp.asarray(np.random.default_rng(1).standard_normal((n_tokens, E)), jnp.float32)
    structure = jax.tree.map(jnp.asarray, init_structure(spec)) if isinstance(spec, PrunedSpec) else {}
    params = {name: value for name, value in params.items() if name not in STRUCTURE}

    def loss(layer, params, x_TE):
        y_TE, info = layer({**params, **structure}, x_TE, spec, implementation)
        return jnp.sum(jnp.square(y_TE)), (y_TE, info.leaf_TP)

    def run(layer):
        grads, out = jax.jit(jax.grad(lambda p, x: loss(layer, p, x), argnums=(0, 1), has_aux=True))(
            params, x_TE
        )
        return out, grads

    return run, *run(tree_ffn)


@pytest.mark.parametrize("spec, shape, implementation, n_tokens", CASES)
def test_equal_to_one_device(spec, shape, implementation, n_tokens):
    run, (y, leaf), grads = case(spec, implementation, n_tokens)
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        (y_mesh, leaf_mesh), grads_mesh = run(sharded_tree_ffn)
    np.testing.assert_array_equal(leaf, leaf_mesh)
    np.testing.assert_allclose(y, y_mesh, atol=1e-5)
    for (path, one), many in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_mesh), strict=True
    ):
        np.testing.assert_allclose(one, many, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_each_device_walks_its_own_trees():
    """Trees over "model": one all-reduce joins the sums and no weight is gathered."""
    params = jax.eval_shape(lambda key: init_params(key, FOUR_TREES, E), jax.random.key(0))
    devices = np.asarray(jax.devices()).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    by_tree = {"w_in", "b_in", "w_out", "threshold"}
    places = {name: PartitionSpec("model" if name in by_tree else None) for name in params}
    shardings = {name: NamedSharding(mesh, place) for name, place in places.items()}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        layer = jax.jit(
            lambda params, x_TE: sharded_tree_ffn(params, x_TE, FOUR_TREES, "masked")[0],
            in_shardings=(shardings, rows),
            out_shardings=rows,
        )
        text = layer.lower(params, jax.ShapeDtypeStruct((T, E), jnp.float32)).compile().as_text()
    assert text.count(" all-reduce(") == 1
    assert "all-gather" not in text and "all-to-all" not in text
