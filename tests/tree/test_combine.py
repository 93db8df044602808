"""What chosen experts add up to: every implementation against the same float64 sum, for given ids and gates.

Who chose them does not matter here: experts of leaf layers, paths of full and of pruned trees.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, PrunedSpec, chosen, combine, grouped, masked, tiles
from tree_ffn.tree.grouped import BLOCK
from tree_ffn.tree.leaf.pruned import kept_row
from tree_ffn.tree.path.pruned import init_structure

E, FEW = 6, 13
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def leaf(X, W, K, activation="gelu"):
    return LeafSpec(
        n_experts=X,
        expert_width=W,
        top_k=K,
        router="softmax" if X > 1 else "tree",
        gate_norm="none",
        activation=activation,
    )


def pruned(nodes, **fields):
    full = cases.make_spec(P=nodes[0], D=len(nodes) - 1, W="per_level", **fields)
    return PrunedSpec(full.shape, activation=full.activation, act_site=full.act_site, nodes=nodes)


SHAPES = {
    "leaves": leaf(8, 3, 2),
    "leaves_of_one_unit": leaf(7, 1, 3, "tanh"),
    "all_leaves": leaf(4, 2, 4, "silu"),
    "one_leaf": leaf(1, 5, 1),
    "paths": cases.make_spec(P=3, D=2, W=2),
    "paths_per_level": cases.make_spec(P=2, D=3, W="per_level", activation="softplus"),
    "paths_of_the_root": cases.make_spec(P=3, D=0, W=4),
    "linear_paths": cases.make_spec(P=2, D=2, act_site="sum"),
    "pruned": pruned((2, 3, 5, 7)),
    "pruned_to_one_path": pruned((3, 3, 3), act_site="sum"),
}


def units_of(spec, structure):
    """From an id to the rows of [F, E] that it names, by the definition of the arrays."""
    if isinstance(spec, LeafSpec):
        return lambda j: range(j * spec.expert_width, (j + 1) * spec.expert_width)
    depth = spec.shape.depth
    if isinstance(spec, PrunedSpec):
        widths = [oracle.rows_of(spec, 2**level - 1) for level in range(depth + 1)]
        widths = [rows.stop - rows.start for rows in widths]
        firsts = np.cumsum([0, *(n * w for n, w in zip(spec.nodes, widths))])

        def of_place(j):
            for level, (first, width) in enumerate(zip(firsts, widths)):
                start = first + structure["path"][j, level] * width
                yield from range(start, start + width)

        return of_place

    def of_path(j):
        tree, at = divmod(j, 2**depth)
        for level in range(depth + 1):
            rows = oracle.rows_of(spec, 2**level - 1 + (at >> (depth - level)))
            yield from range(
                tree * spec.shape.tree_units + rows.start, tree * spec.shape.tree_units + rows.stop
            )

    return of_path


def draw(rng, spec, T):
    """Units, tokens, distinct ids, gates, an output's gradient, and the rows of ids."""
    structure = init_structure(spec) if isinstance(spec, PrunedSpec) else {}
    F = spec.total_units
    params = {
        "w_in": rng.normal(size=(F, E)) / E**0.5,
        "b_in": rng.normal(size=F) / 5,
        "w_out": rng.normal(size=(F, E)),
    }
    if isinstance(spec, LeafSpec):
        ids = np.argsort(rng.random((T, spec.kept_experts)), axis=1)[:, : spec.top_k]
        structure = {"kept_row": kept_row(np.arange(spec.n_experts) < spec.n_kept)} if spec.n_kept else {}
    elif isinstance(spec, PrunedSpec):
        trees = [np.flatnonzero(structure["path"][:, 0] == p) for p in range(spec.shape.n_trees)]
        ids = np.stack([rng.choice(places, T) for places in trees], axis=1)
    else:
        P, J = spec.shape.n_trees, spec.shape.n_leaves
        ids = rng.integers(0, J, (T, P)) + J * np.arange(P)
    x, ds, gates = rng.normal(size=(T, E)), rng.normal(size=(T, E)), rng.uniform(-1, 1.5, ids.shape)
    return params, structure, x, ids, gates, ds


def check(params, structure, x, ids, gates, ds, spec, implementation):
    """Sum and gradients to units, tokens and gates."""
    act = oracle.ACTIVATIONS[spec.activation]
    if getattr(spec, "act_site", "node") == "sum":
        act = oracle.ACTIVATIONS["identity"]
    want, grads = oracle.sum_of_experts(params, x, ids, gates, units_of(spec, structure), act, ds)

    @cases.jit
    def run(params, structure, x, ids, gates, ds):
        total = lambda p, x, gates: combine({**p, **structure}, x, ids, gates, spec, implementation)
        s, back = jax.vjp(total, params, x, gates)
        return s, back(ds)

    s, (d_params, dx, d_gates) = run(*cases.on_device((params, structure, x, ids, gates, ds)))
    assert s.dtype == jnp.float32
    cases.assert_near(s, want, "s")
    cases.assert_same_gradients({**d_params, "x": dx, "gates": d_gates}, grads)


# Every kind of array in every implementation; the edges of a kind in one each.
EDGES = {
    "leaves_of_one_unit": "grouped", "all_leaves": "masked", "one_leaf": "grouped",
    "paths_of_the_root": "gather", "linear_paths": "grouped", "pruned_to_one_path": "gather",
}  # fmt: skip
SUMS = [
    pytest.param(name, how, marks=() if EDGES.get(name, how) == how else pytest.mark.slow)
    for name in SHAPES
    for how in IMPLEMENTATIONS
]


@pytest.mark.parametrize("name, implementation", SUMS)
def test_is_the_sum(name, implementation, rng):
    check(*draw(rng, SHAPES[name], FEW), SHAPES[name], implementation)


@pytest.fixture
def for_a_tpu(monkeypatch):
    """Programs as they are written for a TPU, compiled for this machine; tiles are of 8 lanes."""
    for module in (masked, chosen, grouped):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(tiles, "LANES", 8)
    with pltpu.force_tpu_interpret_mode():
        yield


def leaves(X, W, K, **fields):
    return LeafSpec(n_experts=X, expert_width=W, top_k=K, gate_norm="none", **fields)


# Tiles of neighbours: 2, 8, 1 (wider than a tile), of a flat router 1, and with an expert too few.
OF_TPUS = {name: spec for name, spec in SHAPES.items() if isinstance(spec, LeafSpec)} | {
    "tiles_of_two": leaves(8, 3, 4), "tiles_of_all": leaves(8, 1, 3), "wide": leaves(4, 9, 2),
    "pruned_leaves": leaves(8, 3, 2, n_kept=5),
}  # fmt: skip


OFTEN = ("tiles_of_two", "pruned_leaves")  # a kernel that is interpreted takes its time


@pytest.mark.parametrize("name", OF_TPUS)
def test_masked_is_the_sum_for_a_tpu(name, for_a_tpu, rng):
    check(*draw(rng, OF_TPUS[name], FEW), OF_TPUS[name], "masked")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in OF_TPUS]
)
def test_grouped_is_the_sum_for_a_tpu(name, for_a_tpu, rng):
    check(*draw(rng, OF_TPUS[name], FEW), OF_TPUS[name], "grouped")


@pytest.mark.parametrize("used", [pytest.param([5], marks=pytest.mark.slow), [1, 6]])
def test_for_a_tpu_tiles_may_be_empty_and_full(used, for_a_tpu, rng):
    """More pairs of a tile than a block has, and none of others."""
    spec = leaves(8, 3, 1)
    params, structure, x, ids, gates, ds = draw(rng, spec, tiles.BLOCK + 3)
    check(params, structure, x, np.resize(used, ids.shape), gates, ds, spec, "grouped")


@pytest.mark.parametrize("implementation", ["masked", "grouped"])
def test_for_a_tpu_units_that_are_not_chosen_may_be_no_number(implementation, for_a_tpu, rng):
    check_without_numbers(rng, OF_TPUS["tiles_of_two"], np.nan, implementation)


KINDS = ("leaves", "paths_per_level", "pruned")
NUMBERS = [(0, "leaves"), (1, "pruned"), *((4 * BLOCK + 3, name) for name in KINDS)]
NUMBERS += [pytest.param(0, name, marks=pytest.mark.slow) for name in KINDS[1:]]
NUMBERS += [pytest.param(1, name, marks=pytest.mark.slow) for name in KINDS[:2]]


@every_implementation
@pytest.mark.parametrize("T, name", NUMBERS)
def test_of_any_number_of_tokens(T, name, implementation, rng):
    """None, one, and more of an expert than a block of `grouped` holds."""
    check(*draw(rng, SHAPES[name], T), SHAPES[name], implementation)


@every_implementation
@pytest.mark.parametrize("used", [[0], [5], [1, 6]])
def test_experts_without_tokens(used, implementation, rng):
    spec = dataclasses.replace(SHAPES["leaves"], top_k=1)
    params, structure, x, ids, gates, ds = draw(rng, spec, 2 * BLOCK + 1)
    check(params, structure, x, np.resize(used, ids.shape), gates, ds, spec, implementation)


@every_implementation
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["leaves", "paths"])
def test_units_that_are_not_chosen_may_be_no_number(name, value, implementation, rng):
    """1e30 is one, and its square is none."""
    check_without_numbers(rng, SHAPES[name], value, implementation)


def check_without_numbers(rng, spec, value, implementation):
    spec = dataclasses.replace(spec, activation="relu2")
    params, structure, x, ids, gates, ds = draw(rng, spec, FEW)
    ids = np.where(ids == spec.n_experts - 1, ids - 1, ids)  # the last is free
    if isinstance(spec, LeafSpec):
        ids[:, 1:] = np.where(ids[:, 1:] == ids[:, :1], 0, ids[:, 1:])
    broken = params | {"b_in": params["b_in"].copy()}
    broken["b_in"][-1] = value
    total = cases.jit(lambda p, x, ids, gates: combine(p, x, ids, gates, spec, implementation))
    whole, spoilt = (total(*cases.on_device((p, x, ids, gates))) for p in (params, broken))
    np.testing.assert_array_equal(spoilt, whole)


def test_masked_has_gradients_where_units_that_are_not_chosen_are_no_numbers(rng):
    spec = dataclasses.replace(SHAPES["leaves"], activation="gelu")
    params, _, x, ids, gates, ds = draw(rng, spec, FEW)
    params["b_in"][-1], ids[ids == 7] = np.inf, 0
    params, x, ids, gates, ds = cases.on_device((params, x, ids, gates, ds))
    loss = lambda p, x, g: jnp.vdot(ds, combine(p, x, ids, g, spec, "masked"))
    grads = cases.jit(jax.grad(loss, (0, 1, 2)))(params, x, gates)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))


@every_implementation
@pytest.mark.parametrize("name", ["leaves", "paths", "pruned"])
def test_bfloat16_rounds_hidden_values_and_the_sum(name, implementation, rng):
    """Every number may be off by its rounding and that of the hidden values, no more; sums are float32."""
    spec = dataclasses.replace(SHAPES[name], activation="relu")
    params, structure, x, ids, gates, ds = draw(rng, spec, 2 * BLOCK)
    low = cases.on_device((params, x), jnp.bfloat16)
    params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), low)
    gates = np.abs(gates)
    of, act = units_of(spec, structure), oracle.ACTIVATIONS["relu"]
    want, _ = oracle.sum_of_experts(params, x, ids, gates, of, act, ds)
    sizes = params | {"w_out": np.abs(params["w_out"])}
    size, _ = oracle.sum_of_experts(sizes, x, ids, gates, of, act, ds)
    structure, ids, gates = cases.on_device((structure, ids, gates))
    s = cases.jit(lambda p, x: combine({**p, **structure}, x, ids, gates, spec, implementation))(*low)
    assert s.dtype == jnp.bfloat16
    error = np.abs(np.asarray(s, np.float64) - want)
    assert (error <= cases.BFLOAT16 * (np.abs(want) + 1.01 * size) + 1e-6).all()
    assert error.max() > 0


def test_float32_weights_under_bfloat16_tokens_have_float32_gradients(rng):
    spec = SHAPES["leaves"]
    params, _, x, ids, gates, ds = cases.on_device(draw(rng, spec, FEW))
    x, ds = x.astype(jnp.bfloat16), ds.astype(jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:

        def run(params, x, implementation=implementation):
            s, back = jax.vjp(lambda p, x: combine(p, x, ids, gates, spec, implementation), params, x)
            return s, *back(ds)

        s, grads, dx = jax.eval_shape(run, params, x)
        assert s.dtype == dx.dtype == jnp.bfloat16
        assert all(grad.dtype == jnp.float32 for grad in jax.tree.leaves(grads))


def test_few_tokens_are_gathered_and_a_leak_needs_all_experts(rng):
    spec = leaf(16, 2, 3)
    params, _, x, ids, gates, _ = cases.on_device(draw(rng, spec, 20))
    text = lambda n: str(jax.make_jaxpr(lambda x: combine(params, x, ids[:n], gates[:n], spec))(x[:n]))
    assert "gather" in text(3) and "gather" not in text(4)  # 3 x 3 of 16 experts of two, and 4 x 3
    run = cases.jit(combine, static_argnums=(4, 5))
    with_leak = run(params, x[:4], ids[:4], gates[:4], spec, None, jnp.float32(1.0))
    every = jnp.tile(jnp.arange(16), (4, 1))
    cases.assert_near(with_leak, run(params, x[:4], every, jnp.ones((4, 16)), spec, "gather"))
    with pytest.raises(InputError, match="'gather' computes no expert that is not chosen, and a dense start"):
        combine(params, x, ids, gates, spec, "gather", jnp.float32(1.0))
    with pytest.raises(InputError, match="implementation: 'fast' is not known; use one of: masked, gather"):
        combine(params, x, ids, gates, spec, "fast")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", ["leaves", "all_leaves", "leaves_of_one_unit"])
def test_all_experts_leak_and_everything_learns(name, platform, rng, monkeypatch):
    """A dense start is the sum over all experts with the gates that it says; so are its gradients."""
    for module in (masked, chosen):
        monkeypatch.setattr(module, "platform", lambda: platform)
    spec = SHAPES[name]
    ids = np.argsort(rng.random((FEW, spec.n_experts)), axis=1)[:, : spec.top_k].astype(np.int32)
    shape = (spec.n_experts, spec.expert_width)
    sizes = {"w_in": (*shape, E), "b_in": shape, "w_out": (*shape, E)}
    units = {name: rng.normal(size=size) for name, size in sizes.items()}
    inputs = (units, rng.normal(size=(FEW, E)), rng.random((FEW, spec.top_k)), 0.3)
    inputs = jax.tree.map(jnp.float32, inputs)
    dy = jnp.asarray(rng.normal(size=(FEW, E)), jnp.float32)

    def wanted(units, x, gates, leak):
        is_chosen = jnp.asarray(ids)[:, :, None] == jnp.arange(spec.n_experts)[None, None]
        gate_TX = leak + (1 - leak) * jnp.where(is_chosen, gates[:, :, None], 0.0).sum(axis=1)
        z_TXW = jnp.einsum("te,xwe->txw", x, units["w_in"]) + units["b_in"][None]
        return jnp.einsum("txw,tx,xwe->te", spec.act(z_TXW), gate_TX, units["w_out"])

    layer = lambda units, x, gates, leak: combine(units, x, jnp.asarray(ids), gates, spec, leak=leak)
    (found, back), (want, back_too) = (jax.vjp(jax.jit(run), *inputs) for run in (layer, wanted))
    cases.assert_near(found, want)
    jax.tree.map(cases.assert_near, back(dy), back_too(dy))
