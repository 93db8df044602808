"""The layers inside other people's programs: what JAX may do with a function, it may do with these.

Layer by implementation by transformation: forward mode and second order, the same for few tokens and for
many; 64-bit types; the user's own mesh and shard_map; export with a batch of any size. What is said of CPUs
after `make kernels` is in test_kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tree import cases
from tree_ffn.models import FFN, DenseSpec
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, PrunedSpec, TreeShape, TreeSpec

E = 8
SHAPE = TreeShape(n_trees=2, depth=2, node_width=(1, 2, 3))
LAYERS = {
    "dense": DenseSpec(6),
    "tree": LeafSpec(n_experts=8, expert_width=2, top_k=3, balance_rate=1e-3),
    "trees": LeafSpec(n_experts=16, expert_width=1, top_k=4, n_trees=2, gate_norm="l1"),
    "softmax": LeafSpec(n_experts=6, expert_width=2, top_k=2, router="softmax", gate_norm="rms"),
    "hash": LeafSpec(n_experts=6, expert_width=2, top_k=1, router="hash", gate_norm="none"),
    "hard": TreeSpec(SHAPE, balance_rate=1e-3),
    "straight_through": TreeSpec(TreeShape(n_trees=2, depth=3), routing="straight_through"),
    "random_tree": TreeSpec(SHAPE, router="frozen", act_site="sum"),
    "pruned_leaves": LeafSpec(n_experts=8, expert_width=2, top_k=3, n_kept=5),
    "pruned": PrunedSpec(SHAPE, nodes=(2, 3, 4)),
}
FEW, MANY = 2, 1000
# Every implementation of every kind of array; other routers once, since they meet in ids and gates.
WAYS = [(name, how) for name in ("tree", "hard", "pruned") for how in IMPLEMENTATIONS]
WAYS += [("dense", None), ("tree", None), ("trees", "gather"), ("softmax", "grouped"), ("hash", "masked")]
WAYS += [("random_tree", "gather"), ("pruned_leaves", "gather")]
WAYS += [("straight_through", "masked"), ("straight_through", None)]  # which learn by masked alone
FEW_TOO = (("tree", None), ("hard", "gather"), ("straight_through", None))
# An ordinary run takes these, which hold every function that differentiates or reads rows in its own way;
# `make test-full` takes all.
QUICK = {("tree", how) for how in IMPLEMENTATIONS} | {("hard", "gather")}
QUICK |= {("straight_through", "masked"), ("straight_through", None)}


def of_way(*values, quick=QUICK):
    """A case of `values`, which begin with a layer and an implementation."""
    return pytest.param(*values, marks=() if values[:2] in quick else pytest.mark.slow)


every_way = pytest.mark.parametrize(("name", "how"), [of_way(*way) for way in WAYS], ids=str)
# Few tokens read the rows that they need, many take products with all: None is masked then.
few_and_many = pytest.mark.parametrize(
    ("name", "how", "n_tokens"),
    [of_way(*way, MANY, quick=QUICK - {("straight_through", None)}) for way in WAYS]
    + [pytest.param(*way, FEW, marks=pytest.mark.slow) for way in FEW_TOO],  # whole Jacobians are of few
    ids=str,
)


def tokens(n):
    return jnp.arange(n, dtype=jnp.int32) % 11


@functools.cache
def weights(name):
    """Variables that differ from token to token in what they choose, biases that are not 0."""

    def init(key):
        variables = FFN(LAYERS[name]).init(key, jnp.zeros((FEW, E)), tokens(FEW))
        spread = lambda a: a + 0.3 * jnp.sin(jnp.arange(a.size)).reshape(a.shape).astype(a.dtype)
        return {**variables, "params": jax.tree.map(spread, variables["params"])}

    return cases.jit(init)(jax.random.key(0))


@functools.cache
def case(name, n_tokens, how):
    """(variables, x, the layer as a function of both)."""
    x, variables = jax.random.normal(jax.random.key(1), (n_tokens, E)), weights(name)

    def layer(variables, x):
        ids = jnp.arange(x.shape[0], dtype=jnp.int32) % 11
        return FFN(LAYERS[name], how).apply(variables, x, ids)[0]

    return variables, x, jax.jit(layer)


@few_and_many
def test_forward_mode(name, how, n_tokens):
    variables, x, layer = case(name, n_tokens, how)
    dx, v = (jax.random.normal(jax.random.key(seed), x.shape) for seed in (2, 3))

    @cases.jit
    def run(x, dx, v):
        f = lambda x: layer(variables, x)
        return jax.jvp(f, (x,), (dx,))[1], jax.linearize(f, x)[1](dx), jax.vjp(f, x)[1](v)[0]

    dy, linear, back = run(x, dx, v)
    np.testing.assert_allclose(linear, dy, atol=1e-5)
    np.testing.assert_allclose(jnp.vdot(v, dy), jnp.vdot(back, dx), rtol=1e-4, atol=1e-3)  # by reverse mode


@every_way
def test_jacobian_and_hessian(name, how):
    variables, x, layer = case(name, FEW, how)

    @cases.jit
    def run(x):
        f = lambda x: layer(variables, x)
        loss = lambda x: jnp.square(f(x)).sum()
        return jax.jacfwd(f)(x), jax.jacrev(f)(x), jax.hessian(loss)(x), jax.jacrev(jax.grad(loss))(x)

    forward, reverse, forward_over_reverse, reverse_over_reverse = run(x)
    np.testing.assert_allclose(forward, reverse, atol=1e-5)
    assert jnp.abs(forward_over_reverse).max() > 0.01
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, atol=1e-4)


@few_and_many
def test_hessian_vector_product(name, how, n_tokens):
    """Second order by reverse mode alone, under jit, is that of forward over reverse mode."""
    variables, x, layer = case(name, n_tokens, how)
    dx = jax.random.normal(jax.random.key(2), x.shape)

    @cases.jit
    def run(x, dx):
        grad = jax.grad(lambda x: jnp.square(layer(variables, x)).sum())
        return jax.grad(lambda x: jnp.vdot(grad(x), dx))(x), jax.jvp(grad, (x,), (dx,))[1]

    reverse, forward = run(x, dx)
    np.testing.assert_allclose(reverse, forward, rtol=1e-3, atol=1e-3)
    assert jnp.abs(reverse).max() > 0.01


BATCHES = [of_way(*way, "b", quick=QUICK | {("tree", None)}) for way in WAYS]
BATCHES += [pytest.param(*way, "16*b", marks=pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize(("name", "how", "batch"), BATCHES, ids=str)
def test_export_with_a_batch_of_any_size(name, how, batch):
    variables, _, layer = case(name, FEW, how)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape(batch), E), jnp.float32)
    exported = export.export(layer)(shapes, shape)
    for n_tokens in (16, 48):
        x = jax.random.normal(jax.random.key(n_tokens), (n_tokens, E))
        np.testing.assert_allclose(exported.call(variables, x), layer(variables, x), atol=1e-5)


@every_way
@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_shard_map_of_the_user(name, how, checked):
    """Forward and gradient of weights that all devices share, with shard_map's own checks as by default.

    The collection "params" holds floats only: jax.grad takes it as init returns it.
    """
    n_tokens = 4  # few on each device
    variables, x, _ = case(name, n_tokens, how)
    layer = FFN(LAYERS[name], how)
    rest = {collection: value for collection, value in variables.items() if collection != "params"}
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def loss(params, x, ids):
        return jnp.square(layer.apply({"params": params, **rest}, x, ids)[0]).sum()

    specs = {"mesh": mesh, "in_specs": (P(), P("rows"), P("rows")), "out_specs": P(), "check_vma": checked}
    split_loss = jax.shard_map(lambda *args: jax.lax.psum(loss(*args), "rows"), **specs)
    (one, found), (other, wanted) = (
        cases.jit(jax.value_and_grad(f))(variables["params"], x, tokens(n_tokens)) for f in (split_loss, loss)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


OUR_AXES = [("data",), ("model",), ("data", "model")]  # over which path layers are split by hand
MESHES = [(*way, ("batch",)) for way in WAYS]
MESHES += [("hard", "gather", axes) for axes in OUR_AXES] + [("pruned", "grouped", axes) for axes in OUR_AXES]
MESHES += [("straight_through", "masked", ("data", "model")), ("tree", "grouped", ("data", "model"))]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Where something of ours decides: explicit axes in every layer, and our own axes in path layers
# (tests/models/test_sharded.py has the gradients of their other kinds).
QUICK_MESHES = {(*way, ("batch",), EXPLICIT) for way in QUICK if way != ("straight_through", None)}
QUICK_MESHES |= {("tree", "grouped", ("batch",), AUTO)}
QUICK_MESHES |= {("hard", "gather", axes, AUTO) for axes in OUR_AXES[1:]}
ON_MESHES = [
    pytest.param(*mesh, kind, marks=() if (*mesh, kind) in QUICK_MESHES else pytest.mark.slow)
    for mesh in MESHES
    for kind in (AUTO, EXPLICIT)
]


@functools.cache
def without_mesh(name, how):
    """(variables, x, output and gradients as a function of both, what they are on one device)."""
    variables, x, layer = case(name, 16, how)

    def run(params, rest, x):
        loss = lambda params: jnp.square(layer({"params": params, **rest}, x)).sum()
        return layer({"params": params, **rest}, x), jax.grad(loss)(params)

    rest = {collection: value for collection, value in variables.items() if collection != "params"}
    return variables, x, run, *cases.jit(run)(variables["params"], rest, x)


@pytest.mark.parametrize(("name", "how", "axes", "kind"), ON_MESHES, ids=str)
def test_mesh_of_the_user(name, how, axes, kind):
    """One axis, of our names or another, or both; explicit axes keep how tokens are split. Gradients too."""
    variables, x, run, wanted, wanted_grads = without_mesh(name, how)
    rest = {collection: value for collection, value in variables.items() if collection != "params"}
    mesh = jax.make_mesh(
        (4,) if len(axes) == 1 else (2, 2), axes, (kind,) * len(axes), devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        here = jax.device_put((variables["params"], rest), NamedSharding(mesh, P()))
        y, grads = cases.jit(run)(*here, jax.device_put(x, NamedSharding(mesh, P(axes[0]))))
    if kind == EXPLICIT:
        assert y.sharding.spec[0] == axes[0]
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, wanted_grads)


@every_way
def test_64_bit_types(name, how):
    variables, x, layer = case(name, FEW, how)

    @cases.jit
    def run(variables, x, ids):
        y, back = jax.vjp(lambda x: FFN(LAYERS[name], how).apply(variables, x, ids)[0], x)
        return y, back(y)[0]

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) if a.dtype == jnp.float32 else a, variables)
        y, dx = run(wide, jnp.asarray(x, jnp.float64), jnp.arange(FEW, dtype=jnp.int64) % 11)
        assert y.dtype == dx.dtype == jnp.float64
    # Gates and activations are float32 all the same.
    np.testing.assert_allclose(y, layer(variables, x), atol=1e-5)
    np.testing.assert_allclose(dx, run(variables, x, tokens(FEW))[1], atol=1e-5)


@every_way
def test_vmap_and_scan(name, how):
    """A leading axis by vmap, and one token at a time by scan, give the rows of the whole."""
    variables, x, layer = case(name, 16, how)
    ids = tokens(16)
    one = lambda row, i: FFN(LAYERS[name], how).apply(variables, row[None], i[None])[0][0]
    wanted = layer(variables, x)
    rows = cases.jit(jax.vmap(one))(x, ids)
    _, steps = jax.jit(lambda x, ids: jax.lax.scan(lambda carry, row: (carry, one(*row)), 0, (x, ids)))(
        x, ids
    )
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    np.testing.assert_allclose(steps, wanted, atol=1e-5)


@every_way
def test_vmap_over_layers(name, how):
    """Stacked weights, each with its own tokens."""
    variables, x, layer = case(name, FEW, how)
    other = jax.tree.map(lambda a: a * 2 if jnp.issubdtype(a.dtype, jnp.floating) else a, variables)
    stacked, both = jax.tree.map(lambda *a: jnp.stack(a), variables, other), jnp.stack([x, -x])
    y = cases.jit(jax.vmap(layer))(stacked, both)
    for got, one, rows in zip(y, (variables, other), (x, -x)):
        np.testing.assert_allclose(got, layer(one, rows), atol=1e-5)
