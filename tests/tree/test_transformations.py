"""The layers inside other people's programs: what JAX may do with a function, it may do with these.

Layer by transformation: forward mode and second order, the same for few tokens and for many; 64-bit types;
the user's own mesh and shard_map; export with a batch of any size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tree_ffn.models import FFN, DenseSpec
from tree_ffn.tree.leaf import LeafSpec

E = 8
LAYERS = {
    "dense": DenseSpec(6),
    "tree": LeafSpec(n_experts=8, expert_width=2, top_k=3, balance_rate=1e-3),
    "beam": LeafSpec(n_experts=16, expert_width=1, top_k=4, n_trees=2, search="beam", gate_norm="l1"),
    "softmax": LeafSpec(n_experts=6, expert_width=2, top_k=2, router="softmax"),
    "random": LeafSpec(n_experts=6, expert_width=2, top_k=2, router="random"),
    "hash": LeafSpec(n_experts=6, expert_width=2, top_k=1, router="hash", gate_norm="none"),
}
FEW, MANY = 2, 40  # tokens that are gathered, and that are masked
every_layer = pytest.mark.parametrize(
    "spec",
    [
        # What is never trained is `softmax` to every transformation but a gradient.
        pytest.param(spec, id=name, marks=[pytest.mark.slow] if name == "random" else [])
        for name, spec in LAYERS.items()
    ],
)
few_and_many = pytest.mark.parametrize("n_tokens", [FEW, MANY])


def tokens(n):
    return jnp.arange(n, dtype=jnp.int32) % 11


@functools.cache
def case(spec, n_tokens):
    """(variables, x, the layer as a function of both)."""
    x = jax.random.normal(jax.random.key(1), (n_tokens, E))
    variables = FFN(spec).init(jax.random.key(0), x, tokens(n_tokens))

    def layer(variables, x):
        ids = jnp.arange(x.shape[0], dtype=jnp.int32) % 11
        return FFN(spec).apply(variables, x, ids)[0]

    return variables, x, jax.jit(layer)


@every_layer
@few_and_many
def test_forward_mode(spec, n_tokens):
    variables, x, layer = case(spec, n_tokens)
    dx = jax.random.normal(jax.random.key(2), x.shape)
    f = jax.jit(functools.partial(layer, variables))
    y, dy = jax.jvp(f, (x,), (dx,))
    _, linear = jax.linearize(f, x)
    np.testing.assert_allclose(linear(dx), dy, atol=1e-5)
    # By reverse mode: <v, J dx> = <J^T v, dx>.
    v = jax.random.normal(jax.random.key(3), y.shape)
    (back,) = jax.vjp(f, x)[1](v)
    np.testing.assert_allclose(jnp.vdot(v, dy), jnp.vdot(back, dx), rtol=1e-4, atol=1e-4)


@every_layer
def test_jacobian_and_hessian(spec):
    variables, x, layer = case(spec, FEW)
    f = functools.partial(layer, variables)
    np.testing.assert_allclose(jax.jacfwd(f)(x), jax.jacrev(f)(x), atol=1e-5)
    loss = lambda x: jnp.square(f(x)).sum()
    forward_over_reverse, reverse_over_reverse = jax.hessian(loss)(x), jax.jacrev(jax.grad(loss))(x)
    assert jnp.abs(forward_over_reverse).max() > 0.01
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, atol=1e-4)


@every_layer
@few_and_many
def test_hessian_vector_product(spec, n_tokens):
    variables, x, layer = case(spec, n_tokens)
    loss = lambda x: jnp.square(layer(variables, x)).sum()
    dx = jax.random.normal(jax.random.key(2), x.shape)
    reverse = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), dx)))(x)
    forward = jax.jvp(jax.grad(loss), (x,), (dx,))[1]
    np.testing.assert_allclose(reverse, forward, rtol=1e-3, atol=1e-3)


@every_layer
def test_trained_parameters_alone_have_gradients(spec):
    """The collection "params" holds floats only: jax.grad takes it as init returns it."""
    variables, x, layer = case(spec, FEW)
    routing = {name: value for name, value in variables.items() if name != "params"}
    loss = lambda params: jnp.square(layer({"params": params, **routing}, x)).sum()
    grads = jax.grad(loss)(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@every_layer
@pytest.mark.parametrize("first", ["b", pytest.param("16*b", marks=pytest.mark.slow)])
def test_export_with_a_batch_of_any_size(spec, first):
    variables, _, layer = case(spec, MANY)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    (batch,) = export.symbolic_shape(first)
    exported = export.export(jax.jit(layer))(shapes, jax.ShapeDtypeStruct((batch, E), jnp.float32))
    for n_tokens in (16, 48):
        x = jax.random.normal(jax.random.key(n_tokens), (n_tokens, E))
        np.testing.assert_allclose(exported.call(variables, x), layer(variables, x), atol=1e-5)


@every_layer
@few_and_many
@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_of_the_user(spec, n_tokens, checked):
    """Forward and gradient of weights that all devices share, with shard_map's own checks and without."""
    variables, x, layer = case(spec, n_tokens)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    ids = tokens(n_tokens)

    def loss(variables, x, ids):
        return jnp.square(FFN(spec).apply(variables, x, ids)[0]).sum()

    def split_loss(params, x, ids):
        return jax.lax.psum(loss({**variables, "params": params}, x, ids), "rows")

    specs = {"mesh": mesh, "in_specs": (P(), P("rows"), P("rows")), "out_specs": P(), "check_vma": checked}
    whole = lambda params: loss({**variables, "params": params}, x, ids)
    split = lambda params: jax.shard_map(split_loss, **specs)(params, x, ids)
    params = variables["params"]
    (one, found), (other, wanted) = (jax.jit(jax.value_and_grad(f))(params) for f in (split, whole))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


@every_layer
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_of_the_user(spec, kind):
    """One axis of another name than ours; with explicit axes the tokens' sharding goes through."""
    variables, x, layer = case(spec, MANY)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,), devices=jax.devices()[:4])
    wanted = layer(variables, x)
    with jax.set_mesh(mesh):
        here = jax.device_put(variables, NamedSharding(mesh, P()))
        y = jax.jit(layer)(here, jax.device_put(x, NamedSharding(mesh, P("batch"))))
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@every_layer
def test_64_bit_types(spec):
    variables, x, layer = case(spec, FEW)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) if a.dtype == jnp.float32 else a, variables)
        y = layer(wide, jnp.asarray(x, jnp.float64))
        assert y.dtype == jnp.float64
        ids = jnp.arange(FEW, dtype=jnp.int64) % 11
        again = FFN(spec).apply(wide, jnp.asarray(x, jnp.float64), ids)[0]
        # Gates and activations are float32: a compiled program and ops one by one round differently.
        np.testing.assert_allclose(again, y, atol=1e-6)
    np.testing.assert_allclose(y, layer(variables, x), atol=1e-5)


@every_layer
@few_and_many
def test_vmap_and_scan(spec, n_tokens):
    """A leading axis by vmap, and one token at a time by scan, give the rows of the whole."""
    if spec == LAYERS["hash"]:
        pytest.skip("ids belong to the rows")
    variables, x, layer = case(spec, n_tokens)
    wanted = layer(variables, x)
    rows = jax.vmap(lambda row: layer(variables, row[None])[0])(x)
    _, steps = jax.lax.scan(lambda carry, row: (carry, layer(variables, row[None])[0]), 0, x)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    np.testing.assert_allclose(steps, wanted, atol=1e-5)
