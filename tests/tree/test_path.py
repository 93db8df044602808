"""The path layer: decisions against a float64 oracle, some layers whole, what learns, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import ACTIVATIONS, IMPLEMENTATIONS, TreeShape, TreeSpec, tree_ffn
from tree_ffn.tree.combine import fastest
from tree_ffn.tree.path import balance_update, init_params, route
from tree_ffn.tree.path.route import straight_through, visits
from tree_ffn.tree.usage import leaf_counts

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.partial(cases.jit, static_argnames="spec")
def run_route(params, x, spec):
    return route(params, x, spec)


@functools.partial(cases.jit, static_argnames=("spec", "implementation"))
def run(params, x, dy, spec, implementation):
    """Output, leaves, and gradients of sum(dy * y) to all weights (thresholds and routers too) and to x."""
    y, vjp, info = jax.vjp(lambda *args: tree_ffn(*args, spec, implementation), params, x, has_aux=True)
    return (y, info.leaf_TP, *vjp(dy))


def check(params, x, dy, spec, implementation):
    """The layer decides and computes as the oracle does, which decides for itself."""
    want = oracle.forward(params, x, spec)
    grads, dx = oracle.backward(params, x, spec, dy)
    y, leaf, got_grads, got_dx = run(*cases.on_device((params, x, dy)), spec, implementation)
    assert leaf.dtype == jnp.int32 and y.dtype == x.dtype
    np.testing.assert_array_equal(leaf, want.leaf)
    cases.assert_near(y, want.y, "y")
    cases.assert_near(got_dx, dx, "dx")
    cases.assert_same_gradients(got_grads, grads)


# Decisions.


@pytest.mark.parametrize("P, D, W", [(1, 0, 2), (1, 3, 1), (3, 2, "per_level"), (2, 4, 2)])
@pytest.mark.parametrize("router", ["first_unit", "frozen"])
@pytest.mark.parametrize("T", [0, 1, 40])
def test_paths(P, D, W, router, T, rng):
    """One token reads the routers that it meets, many take all at once; no token takes no path."""
    spec = cases.make_spec(P=P, D=D, W=W, router=router if D else "first_unit")
    params, x, _ = cases.grid_case(rng, spec, T=T)
    ids, gates = run_route(*cases.on_device((params, x)), spec)
    assert ids.dtype == jnp.int32 and gates.dtype == jnp.float32
    np.testing.assert_array_equal(ids, oracle.forward(params, x, spec).leaf + 2**D * np.arange(P))
    assert gates.shape == ids.shape and (gates == 1).all()


def test_paths_carry_no_gradient(rng):
    spec = cases.make_spec(P=2, D=2)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    grads = jax.grad(lambda params, x: route(params, x, spec)[1].sum(), (0, 1))(params, x)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


@every_implementation
@pytest.mark.parametrize("T", [1, 5])
def test_ties_go_left(implementation, T, rng):
    """r = 0 at the root of both trees and at a node below."""
    spec = cases.make_spec(P=2, D=2, W=2)
    params, x, dy = cases.grid_case(rng, spec, T=T)
    z = np.einsum("pue,e->pu", params["w_in"], x[0]) + params["b_in"]
    params["threshold"][:, 0] = z[:, 0]
    params["threshold"][0, 1] = z[0, 2]
    want = oracle.forward(params, x, spec)
    assert want.leaf[0, 0] == 0 and want.leaf[0, 1] in (0, 1)
    assert want.paths[0][0][0].r == 0 and want.paths[0][0][1].r == 0
    check(params, x, dy, spec, implementation)


@every_implementation
def test_nan_goes_left_and_stays_with_its_token(implementation, rng):
    spec = cases.make_spec(P=2, D=2, W=2)
    params, x, _ = cases.grid_case(rng, spec)
    layer = cases.jit(lambda params, x: tree_ffn(params, x, spec, implementation))
    want = oracle.forward(params, x, spec)
    x[3] = np.nan
    y, info = layer(*cases.on_device((params, x)))
    others = np.arange(len(x)) != 3
    np.testing.assert_array_equal(info.leaf_TP[3], [0, 0])
    np.testing.assert_array_equal(info.leaf_TP[others], want.leaf[others])
    assert np.all(np.isnan(y[3]))
    cases.assert_near(y[others], want.y[others], "y")


@every_implementation
@pytest.mark.parametrize("routing", ["hard", "straight_through"])
def test_a_threshold_may_be_no_number(routing, implementation, rng):
    """NaN decides left, minus infinity right, infinity left: the decision is no number, the output is one."""
    spec = cases.make_spec(routing, P=3, D=2)
    params, x, _ = cases.grid_case(rng, spec)
    params["threshold"][:, 0] = [np.nan, -np.inf, np.inf]
    want = oracle.forward(params, x, spec)
    assert (want.leaf // 2 == [0, 1, 0]).all()
    layer = cases.jit(lambda params, x: tree_ffn(params, x, spec, implementation))
    y, info = layer(*cases.on_device((params, x)))
    np.testing.assert_array_equal(info.leaf_TP, want.leaf)
    cases.assert_near(y, want.y)


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decisions_differ_only_within_the_rounding_bound(implementation, dtype, rng):
    """Not a tolerance on everything: a leaf may differ only where |r| is below what float32 sums can resolve.

    And along the paths taken, the output is right to the precision of the dtype.
    """
    spec = cases.make_spec(P=4, D=5, activation="gelu")
    params, x, dy = cases.random_case(rng, spec, T=64, E=24, dtype=dtype)
    # Half of the tokens are moved onto the boundary of a root whose threshold is large: |r| is tiny there,
    # the product <w, x> is not, and rounding that to bfloat16 would turn many decisions.
    params["threshold"] = params["threshold"].at[0, 0].set(4.0)
    w, offset = np.asarray(params["w_in"][0, 0], np.float64), 4.0 - float(params["b_in"][0, 0])
    near = np.asarray(x[:32], np.float64)
    near -= ((near @ w - offset) / (w @ w))[:, None] * w
    x = jnp.concatenate([jnp.asarray(near, dtype), x[32:]])
    y, leaf, grads, dx = run(params, x, dy, spec, implementation)
    for size, bound in oracle.decision_margin(params, x, spec, leaf):
        assert size <= bound, f"decided against |r| = {size:.2e}, bound {bound:.2e}"
    # Four roundings of the largest entry: what units add, their sum, what is added to it, sums over tokens.
    tolerance = 2e-5 if dtype == jnp.float32 else 4 * cases.BFLOAT16
    assert y.dtype == dx.dtype == dtype
    cases.assert_near(y, oracle.forward(params, x, spec, leaf).y, "y", tolerance)
    want, want_dx = oracle.backward(params, x, spec, dy, leaf)
    cases.assert_near(dx, want_dx, "dx", tolerance)
    cases.assert_same_gradients(grads, want, implementation, tolerance)


# Layers whole.

WHOLE = [
    ("masked", {"P": 3, "W": "per_level"}),
    ("masked", {"P": 2, "D": 3, "act_site": "sum", "activation": "tanh"}),
    ("masked", {"W": 2, "router": "frozen", "activation": "abs"}),
    ("masked", {"D": 0, "W": 3}),
    ("gather", {"P": 2, "D": 3, "W": "per_level", "activation": "softplus"}),
    ("gather", {"W": 2, "router": "frozen", "act_site": "sum"}),
    ("grouped", {"P": 3, "D": 2, "W": 2, "activation": "silu"}),
    ("grouped", {"P": 1, "D": 1, "W": "per_level", "act_site": "sum", "activation": "relu2"}),
    (None, {"P": 2, "D": 2}),
]
LEARNING = [
    {"P": 2, "D": 3},
    {"P": 1, "D": 2, "W": "per_level", "activation": "leaky_relu"},
    {"P": 3, "D": 2, "W": 2, "act_site": "sum", "activation": "tanh"},
    {"P": 2, "D": 1, "W": 2},
]


@pytest.mark.parametrize("implementation, fields", WHOLE, ids=str)
def test_hard_layers_whole(implementation, fields, rng):
    spec = cases.make_spec(**fields)
    check(*cases.grid_case(rng, spec), spec, implementation)


@pytest.mark.parametrize("fields", LEARNING, ids=str)
def test_straight_through_layers_whole(fields, rng):
    """Routers learn by s'(r) <dL/dy, V(right) - V(left)>, by ordinary differentiation."""
    spec = cases.make_spec("straight_through", **fields)
    check(*cases.grid_case(rng, spec), spec, "masked")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_nodes_and_at_the_sum(name, rng):
    spec = cases.make_spec(activation=name)
    check(*cases.grid_case(rng, spec, T=3), spec, "masked")
    if name != "identity":  # of which the sum is the same
        summed = dataclasses.replace(spec, act_site="sum")
        check(*cases.grid_case(rng, summed, T=3), summed, "gather")


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_no_token_is_no_output(implementation, rng):
    spec = cases.make_spec(P=2, D=2)
    params, x, dy = cases.on_device(cases.grid_case(rng, spec))
    y, leaf, grads, _ = run(params, x[:0], dy[:0], spec, implementation)
    assert (y.shape, leaf.shape) == (x[:0].shape, (0, 2)) and not any(map(np.any, jax.tree.leaves(grads)))


# What learns.


@every_implementation
def test_a_router_learns_from_its_other_child_by_straight_through_alone(implementation, rng):
    """Every visited router's gradient changes with its untaken child's w_out; under hard none does."""
    for routing in ("hard", "straight_through") if implementation == "masked" else ("hard",):
        spec = cases.make_spec(routing, P=1, D=3, W=2)
        params, x, dy = cases.grid_case(rng, spec, T=1)
        steps = oracle.forward(params, x, spec).paths[0][0]
        before = run(*cases.on_device((params, x, dy)), spec, implementation)[2]["w_in"][0]
        for level in range(3):
            sibling = steps[level + 1].node + (1 if steps[level + 1].node % 2 else -1)
            changed = params | {"w_out": params["w_out"].copy()}
            changed["w_out"][0, oracle.rows_of(spec, sibling)] += 1.0
            after = run(*cases.on_device((changed, x, dy)), spec, implementation)[2]["w_in"][0]
            differs = np.any(np.asarray(after != before), axis=-1)
            expected = [steps[level].rows.start] if routing == "straight_through" else []
            assert np.flatnonzero(differs).tolist() == expected


@pytest.mark.parametrize("implementation", ["gather", "grouped"])
def test_straight_through_is_differentiated_by_masked_only(implementation, rng):
    hard = cases.make_spec("hard", P=2, D=2)
    spec = dataclasses.replace(hard, routing="straight_through")
    params, x, dy = cases.on_device(cases.grid_case(rng, spec))
    layer = cases.jit(lambda params, x, spec: tree_ffn(params, x, spec, implementation)[0], static_argnums=2)
    y, y_hard = (layer(params, x, s) for s in (spec, hard))
    np.testing.assert_array_equal(y, y_hard)
    words = f"'{implementation}' cannot differentiate routing 'straight_through'.*use 'masked'"
    with pytest.raises(InputError, match=words):
        run(params, x, dy, spec, implementation)


@pytest.mark.parametrize("T, W", [(1, 1), (3, 3)])
def test_straight_through_learns_by_default_whatever_the_number_of_tokens(T, W, rng):
    """Few tokens gather; their derivatives, of second order too, are masked's."""
    spec = cases.make_spec("straight_through", P=2, D=3, W=W)
    params, x, dy = cases.on_device(cases.grid_case(rng, spec))
    x, dy = x[:T], dy[:T]

    def product(implementation):
        loss = lambda params, x: jnp.sum(jnp.sin(tree_ffn(params, x, spec, implementation)[0]) * dy)
        grads = jax.grad(loss, argnums=(0, 1))
        _, second = jax.jvp(lambda x: grads(params, x)[1], (x,), (dy,))
        return grads(params, x), second

    assert fastest(params, x, spec) == "gather"
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, jax.jit(lambda: product(None))(), jax.jit(lambda: product("masked"))())


@pytest.mark.parametrize("routing", ["hard", "straight_through"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_leaf_off_the_path_may_be_no_number(routing, value, rng):
    """Output and gradients are numbers, and are those of a layer whose leaf is not visited either."""
    spec = cases.make_spec(routing, P=1, D=2, activation="relu2")
    params, x, dy = cases.grid_case(rng, spec)
    params["threshold"][0, 2] = np.inf  # leaf 3 is not reached
    broken = params | {"b_in": params["b_in"].copy()}
    broken["b_in"][0, 6] = value
    y, leaf, grads, dx = run(*cases.on_device((broken, x, dy)), spec, "masked")
    want = oracle.forward(params, x, spec)
    np.testing.assert_array_equal(leaf, want.leaf)
    cases.assert_near(y, want.y)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((grads, dx)))


def test_decisions_are_steps_with_the_slope_of_a_sigmoid():
    r = np.array([-200.0, -2.0, -0.1, 0.0, 0.1, 2.0, 200.0], np.float32)
    d, slope = jax.vmap(jax.value_and_grad(lambda r: straight_through(r)))(jnp.asarray(r))
    np.testing.assert_array_equal(d, r > 0)  # exactly, or units off the path would work a little
    e = np.exp(-np.abs(r.astype(np.float64)))
    np.testing.assert_allclose(slope, e / (1 + e) ** 2, rtol=1e-5, atol=1e-7)


def test_visits_are_products_of_decisions(rng):
    right = rng.random((4, 2, 7)).astype(np.float32)
    levels = visits(jnp.asarray(right))
    assert [level.shape for level in levels] == [(4, 2, 2**l) for l in range(4)]
    for leaf in range(8):
        want = np.ones((4, 2), np.float32)
        for level in range(3):
            node, side = 2**level - 1 + (leaf >> (3 - level)), leaf >> (2 - level) & 1
            want = want * (right[..., node] if side else 1 - right[..., node])
        np.testing.assert_allclose(levels[3][..., leaf], want, rtol=1e-6)


# Balancing.


def balanced(threshold, leaf, rate, depth):
    """threshold += rate * sign(visits right - visits left), node by node."""
    threshold = threshold.copy()
    for p, n in np.ndindex(threshold.shape[0], 2**depth - 1):
        level = int(np.log2(n + 1))
        here = leaf[:, p] >> (depth - level) == n - (2**level - 1)
        right = leaf[here, p] >> (depth - level - 1) & 1
        threshold[p, n] += rate * np.sign(right.sum() - (1 - right).sum())
    return threshold


@pytest.mark.parametrize("T", [1, 40])
def test_balance_update(T, rng):
    spec = cases.make_spec(P=3, D=3, W=2, balance_rate=0.125)
    threshold = cases.on_grid(rng, 3, 15)
    leaf = rng.integers(0, 8, (T, 3), np.int32)
    leaf[:, 2] = 5  # one leaf takes all: unvisited nodes stay
    got = balance_update({"threshold": jnp.asarray(threshold)}, leaf_counts(jnp.asarray(leaf), 8), spec)
    np.testing.assert_array_equal(got, balanced(threshold, leaf, 0.125, 3))
    np.testing.assert_array_equal(got[:, 7:], threshold[:, 7:])


def test_balance_evens_out_a_skewed_router(rng):
    """The sign of the rule: a bias that sends most tokens right is undone."""
    spec = cases.make_spec(P=1, D=1, balance_rate=0.05)
    params = cases.first_weights(init_params, spec, 4)
    params["b_in"] = params["b_in"].at[0, 0].set(1.5)
    x = jnp.asarray(rng.normal(size=(501, 4)), jnp.float32)
    for _ in range(60):
        leaf_TP = run_route(params, x, spec)[0]
        params["threshold"] = balance_update(params, leaf_counts(leaf_TP, 2), spec)
    assert abs(float(leaf_TP.mean()) - 0.5) < 0.05


# The door.


def test_initial_weights():
    spec = cases.make_spec(P=4, D=4, W=4)
    params = cases.first_weights(init_params, spec, 48, w_in_scale=0.7, w_out_scale=2.0)
    assert set(params) == {"w_in", "b_in", "w_out", "b_out", "threshold"}
    assert np.std(params["w_in"]) == pytest.approx(0.7 / 48**0.5, rel=0.05)
    assert np.std(params["w_out"]) == pytest.approx(2.0 / spec.active_units**0.5, rel=0.05)
    assert not any(np.any(params[name]) for name in ("b_in", "b_out", "threshold"))
    assert len(np.unique(params["w_in"][..., 0])) == spec.total_units  # no two units start alike
    frozen = dataclasses.replace(spec, router="frozen")
    w = cases.first_weights(init_params, frozen, 8, param_dtype=jnp.bfloat16)["router"]["w"]
    assert w.shape == (4, 15, 8) and w.dtype == jnp.float32 and np.unique(w).size == w.size


@pytest.mark.parametrize("name", ["w_in", "b_in", "w_out", "b_out", "threshold"])
def test_weights_of_another_shape_are_named(name, rng):
    spec = cases.make_spec(router="frozen")
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match=f"^{name}: shape .*need"):
        tree_ffn(params | {name: params[name][..., :-1]}, x, spec)
    with pytest.raises(InputError, match="^router.w: shape .*need"):
        tree_ffn(params | {"router": {"w": params["router"]["w"][:-1]}}, x, spec)
    del params[name]
    with pytest.raises(InputError, match=f"^{name}: is missing"):
        tree_ffn(params, x, spec)


def test_tokens_must_be_a_matrix_of_floats(rng):
    spec = cases.make_spec()
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match="x: shape .*tokens, width"):
        tree_ffn(params, x[None], spec)
    with pytest.raises(InputError, match="x: dtype int32 .*float32 or bfloat16"):
        tree_ffn(params, x.astype(jnp.int32), spec)
    with pytest.raises(InputError, match="implementation: 'sparse' .*masked.*gather.*grouped"):
        tree_ffn(params, x, spec, "sparse")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"routing": "soft"}, "routing: 'soft' .*hard, straight_through"),
        ({"act_site": "leaf"}, "act_site: 'leaf' .*node, sum"),
        ({"activation": "swish"}, "activation: 'swish' .*gelu"),
        ({"router": "token"}, "router: 'token' .*first_unit, frozen"),
        ({"balance_rate": -0.1}, "balance_rate: -0.1 .*at least 0"),
        ({"balance_rate": float("nan")}, "balance_rate: nan"),
        ({"balance_rate": 0.1, "shape": TreeShape(1, 0)}, "balance_rate: 0.1 .*depth 0.*use 0"),
        ({"routing": "straight_through", "shape": TreeShape(1, 0)}, "routing: .*depth 0.*use 'hard'"),
        ({"router": "frozen", "shape": TreeShape(1, 0)}, "router: 'frozen' .*depth 0.*use 'first_unit'"),
        ({"act_site": "sum", "activation": "identity"}, "act_site: 'sum' .*'identity'.*use 'node'"),
        ({"router": "frozen", "routing": "straight_through"}, "routing: 'straight_through' .*frozen.*hard"),
    ],
)
def test_specs_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        TreeSpec(**{"shape": TreeShape(1, 1), **fields})
