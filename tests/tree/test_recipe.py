"""The recommended layer in anybody's own model: Linen, NNX and plain JAX give its dense start alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from tree_ffn import recipe
from tree_ffn.errors import InputError
from tree_ffn.models import FFN, DenseSpec
from tree_ffn.models.dense import dense_ffn
from tree_ffn.models.ffn import active_units, products, total_units
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec, leaf_ffn

SPEC = LeafSpec(n_experts=8, expert_width=2, top_k=2, dense_start=0.5)
E, LAYER = 6, FFN(SPEC)
X = jax.random.normal(jax.random.key(0), (5, E))


@pytest.fixture(scope="module")
def params():
    return jax.jit(LAYER.init)(jax.random.key(1), X)["params"]


def test_its_sizes():
    spec = recipe(768)
    assert (total_units(spec), active_units(spec), products(spec)) == (4 * 768, 96, 287)
    with pytest.raises(InputError, match="width: 100 is not allowed; use a multiple of 128"):
        recipe(100)


def linen(params, done):
    return LAYER.apply({"params": params}, X, done=done)[0]


def with_nnx(params, done):
    layer = bridge.ToNNX(LAYER, rngs=nnx.Rngs(0)).lazy_init(X)
    for name, value in params.items():
        setattr(layer, name, nnx.Param(value))
    return layer(X, done=done)[0]


def plain(params, done):
    return leaf_ffn(params, X, SPEC, leak=None if done is None else SPEC.leak_at(done))[0]


@pytest.mark.parametrize("layer", [linen, with_nnx, plain])
def test_its_dense_start(layer, params):
    flat = {name: params[name].reshape(-1, E) for name in ("w_in", "w_out")}
    flat |= {"b_in": params["b_in"].reshape(-1), "b_out": params["b_out"]}
    dense, _ = jax.jit(dense_ffn, static_argnums=2)(flat, X, DenseSpec(SPEC.total_units))
    sparse, _ = jax.jit(leaf_ffn, static_argnums=2)(params, X, SPEC)
    run = jax.jit(lambda params, done: layer(params, done))
    np.testing.assert_allclose(run(params, jnp.float32(0.0)), dense, rtol=1e-5, atol=1e-5)
    half = run(params, jnp.float32(0.25))
    np.testing.assert_allclose(half, dense / 2 + sparse / 2, rtol=1e-5, atol=1e-5)
    for done in (0.5, 1.0):
        np.testing.assert_allclose(run(params, jnp.float32(done)), sparse, rtol=1e-5, atol=1e-5)
    in_use = jax.jit(lambda params: layer(params, None))(params)
    np.testing.assert_allclose(in_use, sparse, rtol=1e-5, atol=1e-5)


def test_they_train_alike(params):
    """A loop of one's own, over the dense start and beyond its end."""

    def trained(layer):
        loss = lambda params, done: jnp.square(layer(params, done) - X).mean()
        grad, new = jax.jit(jax.grad(loss)), params
        for step in range(4):
            new = jax.tree.map(lambda p, g: p - 0.1 * g, new, grad(new, jnp.float32(step / 4)))
        return new

    wanted = trained(linen)
    assert all((wanted[name] != params[name]).any() for name in ("w_in", "w_out", "w_router", "b_router"))
    for layer in (with_nnx, plain):
        found = trained(layer)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize(
    "spec", [DenseSpec(4), LeafSpec(n_experts=4, expert_width=1, top_k=2), TreeSpec(TreeShape(1, 1))]
)
def test_layers_without_a_dense_start_take_none(spec):
    with pytest.raises(InputError, match="done: the layer .* has no dense start; leave it out"):
        jax.eval_shape(FFN(spec).init, jax.random.key(0), X, done=0.1)


def differentiated(params, x, spec=SPEC, **told):
    return jax.grad(lambda params, x: leaf_ffn(params, x, spec, **told)[0].sum(), argnums=(0, 1))(params, x)


def test_training_without_its_dense_start_is_refused(params):
    """In any mode, by weights or tokens, in a model that scans and recomputes; use needs no word."""
    loss = lambda params: jnp.square(linen(params, None)).sum()
    in_loop = lambda params: jax.lax.scan(
        lambda y, _: (jax.checkpoint(linen)(params, None) + y, 0), X, None, 2
    )
    for wrong in (
        lambda: jax.grad(loss)(params),
        lambda: jax.jit(jax.grad(loss))(params),
        lambda: jax.eval_shape(lambda params: jax.jvp(loss, (params,), (params,)), params),
        lambda: jax.eval_shape(jax.grad(lambda params: in_loop(params)[0].sum()), params),
        lambda: jax.eval_shape(jax.grad(lambda x: leaf_ffn(params, x, SPEC)[0].sum()), X),
        lambda: jax.eval_shape(differentiated, params, X),
    ):
        with pytest.raises(
            InputError, match="^done: is missing in the training of a layer with a dense start"
        ):
            wrong()
    wanted = jax.jit(differentiated, static_argnums=2)(params, X, SPEC, leak=jnp.float32(0))
    found = jax.jit(differentiated, static_argnums=2)(params, X, SPEC.after_start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
    assert jnp.isfinite(jax.jit(loss)(params))
