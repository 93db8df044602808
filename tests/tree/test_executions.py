"""Masked, gather and grouped against the float64 oracle: outputs, leaves and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import ACTIVATIONS, loop, pick_implementation, tree_ffn

FACTORS = {
    "routing": cases.ROUTINGS,
    "activation": tuple(ACTIVATIONS),
    "act_site": ("node", "sum"),
    "P": (1, 3),
    "D": (0, 1, 2),
    "W": (1, 3, "per_level"),
    "S": (0, 2),
}
PAIRS = cases.all_pairs(FACTORS)
PRODUCT = cases.all_combinations(FACTORS | {"D": (0, 3), "W": (1, "per_level")})
BATCHED_FACTORS = FACTORS | {
    "routing": ("hard", "continuous_min"),
    "activation": ("silu",),
    "W": (1, "per_level"),
}
# Four roundings of the largest entry: of what units add, their sum, what is added to it, sums over tokens.
FOUR_ROUNDINGS = 4 * 2.0**-8
ALL_FORMS = (*cases.EXECUTIONS, cases.BATCHED)


def name_of(case):
    return "-".join(f"{k}{v}" if len(k) == 1 else str(v) for k, v in case.items())


@cases.compiled
def run_backward(params, x, dy, spec, execution):
    """Output, leaves, and gradients of sum(dy * y) to all weights (thresholds too) and to x."""
    with cases.traced_form(execution):
        y, vjp, info = jax.vjp(lambda *args: cases.layer(*args, spec, execution), params, x, has_aux=True)
        return (y, info.leaf_TP, *vjp(dy))


def differentiable(spec, execution):
    return spec.routing != "straight_through" or execution in ("masked", None)


def assert_near(got, want, what, tolerance=2e-5):
    """Largest error within `tolerance` of the largest entry (or of 1): float32 sums of a few dozen terms."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape, what
    error = np.max(np.abs(got - want), initial=0.0) / max(1.0, np.max(np.abs(want), initial=0.0))
    assert error <= tolerance, f"{what}: off by {error:.2e}"


def assert_same_gradients(got, want, what, tolerance=2e-5):
    """The oracle's gradients, 0 wherever the oracle's is; none to thresholds and frozen routers."""
    assert got.keys() >= want.keys(), what
    for name, value in got.items():
        if name in ("threshold", "router"):
            assert not np.any(jax.tree.leaves(value)[0]), f"{what} {name} has a gradient"
        elif name == "shared":
            assert_same_gradients(value, want[name], f"{what} shared", tolerance)
        else:
            assert_near(value, want[name], f"{what} d{name}", tolerance)
            assert not np.any(np.asarray(value)[want[name] == 0]), f"{what} d{name} beside the path"


def check(params, x, dy, spec, executions=cases.EXECUTIONS):
    """Every execution decides and computes as the oracle does, which decides for itself."""
    want = oracle.forward(params, x, spec)
    grads, dx = oracle.backward(params, x, spec, dy)
    device_params, x, dy = cases.on_device((params, x, dy))
    for execution in executions:
        if not differentiable(spec, execution):
            y, leaf = cases.run_forward(device_params, x, spec, execution)
        else:
            y, leaf, got_grads, got_dx = run_backward(device_params, x, dy, spec, execution)
            assert_same_gradients(got_grads, grads, str(execution))
            assert_near(got_dx, dx, f"{execution} dx")
        assert leaf.dtype == jnp.int32 and y.dtype == x.dtype
        np.testing.assert_array_equal(leaf, want.leaf, err_msg=str(execution))
        assert_near(y, want.y, f"{execution} y")


def test_the_quick_cases_hold_every_pair_of_options():
    for a in FACTORS:
        for b in FACTORS:
            if a != b:
                held = {(case[a], case[b]) for case in PAIRS}
                assert len(held) == len(FACTORS[a]) * len(FACTORS[b]), (a, b)


@pytest.mark.parametrize("case", PAIRS, ids=name_of)
def test_agrees_with_the_oracle(case, rng):
    spec = cases.make_spec(**case)
    check(*cases.grid_case(rng, spec), spec)


@pytest.mark.parametrize("case", cases.all_pairs(BATCHED_FACTORS), ids=name_of)
def test_batched_form_agrees_with_the_oracle(case, rng):
    spec = cases.make_spec(**case)
    check(*cases.grid_case(rng, spec), spec, executions=(cases.BATCHED,))


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=name_of)
def test_agrees_with_the_oracle_everywhere(case, rng):
    spec = cases.make_spec(**case)
    check(*cases.grid_case(rng, spec), spec, executions=ALL_FORMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "routing, W",
    [
        ("straight_through", 1),
        ("continuous_min", "per_level"),
        ("continuous_product", 1),
        pytest.param("straight_through", "per_level", marks=pytest.mark.slow),
        pytest.param("continuous_min", 1, marks=pytest.mark.slow),
        pytest.param("continuous_product", "per_level", marks=pytest.mark.slow),
    ],
)
def test_silent_routers(routing, W, rng):
    spec = cases.make_spec(routing, P=2, D=2, W=W, S=1, router="silent")
    check(*cases.grid_case(rng, spec), spec, executions=ALL_FORMS)
    check(*cases.grid_case(rng, spec), dataclasses.replace(spec, act_site="sum"))


@pytest.mark.parametrize("routing", ["continuous_min", "continuous_product"])
def test_logistic_openness(routing, rng):
    spec = cases.make_spec(routing, P=2, D=2, W="per_level", openness="logistic")
    check(*cases.grid_case(rng, spec), spec, executions=ALL_FORMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "routing, router, act_site, D, norm",
    [
        ("continuous_min", "first_unit", "sum", 2, 1),
        ("continuous_product", "silent", "node", 2, 2),
        ("continuous_product", "silent", "node", 0, 2),
        pytest.param("continuous_min", "first_unit", "sum", 2, 2, marks=pytest.mark.slow),
        pytest.param("continuous_product", "silent", "node", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_gates_of_norm_one(routing, router, act_site, D, norm, rng):
    how = {"openness": "logistic", "renormalise": True, "router": router, "act_site": act_site}
    spec = cases.make_spec(routing, P=3, D=D, W="per_level", S=1, gate_norm=norm, **how)
    check(*cases.grid_case(rng, spec), spec, executions=ALL_FORMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "beam, D, fields",
    [
        (2, 3, {"router": "silent", "W": 1, "renormalise": True, "gate_norm": 2}),
        (2, 2, {"router": "first_unit", "W": "per_level", "S": 1, "act_site": "sum"}),
        (4, 3, {"router": "silent", "W": "per_level"}),
        (3, 0, {}),
    ],
    ids=str,
)
def test_a_beam(beam, D, fields, rng):
    """All executions find the leaf that the oracle's search finds, not always the first that is met."""
    how = {"openness": "logistic", "activation": "gelu", **fields}
    spec = cases.make_spec("continuous_product", P=3, D=D, beam=beam, **how)
    params, x, dy = cases.grid_case(rng, spec, T=40)
    # Off the grid, so that no two gates are equal.
    params["threshold"] = params["threshold"] + rng.normal(0, 0.01, params["threshold"].shape).astype(
        np.float32
    )
    check(params, x, dy, spec, executions=ALL_FORMS)
    check(params, x[:2], dy[:2], spec, executions=("gather",))  # few tokens read the routers that they ask
    if D > 1:
        greedy = oracle.forward(params, x, dataclasses.replace(spec, beam=1)).leaf
        assert 0.02 < np.mean(greedy != oracle.forward(params, x, spec).leaf) < 0.5


def test_frozen_routers(rng):
    spec = cases.make_spec(P=2, D=2, W="per_level", S=1, act_site="sum", router="frozen")
    check(*cases.grid_case(rng, spec), spec)


# Odd cases, always.


@pytest.mark.parametrize("routing", ["hard", "continuous_min"])
def test_one_token(routing, rng):
    spec = cases.make_spec(routing, P=2, D=3, W=2)
    check(*cases.grid_case(rng, spec, T=1), spec)


@pytest.mark.parametrize("routing", ["straight_through", "continuous_product"])
def test_one_leaf_takes_all(routing, rng):
    """Infinite thresholds: every token goes right in one tree, left in the other; gradients stay finite."""
    spec = cases.make_spec(routing, P=2, D=2, W=2, S=1)
    params, x, dy = cases.grid_case(rng, spec)
    params["threshold"] = np.full_like(params["threshold"], -np.inf)
    params["threshold"][1] = np.inf
    assert np.all(oracle.forward(params, x, spec).leaf == [3, 0])
    check(params, x, dy, spec)


@pytest.mark.slow
@pytest.mark.parametrize("routing, P, W", [("hard", 1, 2), ("continuous_min", 3, "per_level")])
def test_many_tokens_few_leaves(routing, P, W, rng):
    """More tokens than one block holds, in every tree; some leaves are empty."""
    spec = cases.make_spec(routing, P=P, D=3, W=W, activation="silu")
    params, x, dy = cases.grid_case(rng, spec, T=300)
    params["threshold"][0, 0] = 64.0
    counts = np.bincount(oracle.forward(params, x, spec).leaf[:, 0], minlength=8)
    assert np.all(counts[4:] == 0) and counts.max() > loop.block_size(300, 8)
    check(params, x, dy, spec, executions=ALL_FORMS)


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_ties_go_left(routing, rng):
    """r = 0 at the root of both trees and at a node below; the gates there are 0, and so are their slopes."""
    spec = cases.make_spec(routing, P=2, D=2, W=2, activation="gelu")
    params, x, dy = cases.grid_case(rng, spec, T=5)
    z = np.einsum("pue,e->pu", params["w_in"], x[0]) + params["b_in"]
    params["threshold"][:, 0] = z[:, 0]
    params["threshold"][0, 1] = z[0, 2]
    want = oracle.forward(params, x, spec)
    assert want.leaf[0, 0] == 0 and want.leaf[0, 1] in (0, 1)
    assert want.paths[0][0][0].r == 0 and want.paths[0][0][1].r == 0
    check(params, x, dy, spec)


@pytest.mark.parametrize("execution", ALL_FORMS)
def test_nan_goes_left_and_stays_with_its_token(execution, rng):
    spec = cases.make_spec("hard", P=2, D=2, W=2, S=1)
    params, x, _ = cases.grid_case(rng, spec)
    want = oracle.forward(params, x, spec)
    x[3] = np.nan
    y, leaf = cases.run_forward(*cases.on_device((params, x)), spec, execution)
    others = np.arange(len(x)) != 3
    np.testing.assert_array_equal(leaf[3], [0, 0])
    np.testing.assert_array_equal(leaf[others], want.leaf[others])
    assert np.all(np.isnan(y[3]))
    assert_near(y[others], want.y[others], "y")


def test_nan_goes_left_with_a_beam(rng):
    spec = cases.make_spec("continuous_product", P=2, D=3, W=2, openness="logistic", beam=2)
    params, x, _ = cases.grid_case(rng, spec)
    x[3] = np.nan
    for execution in ALL_FORMS:
        _, leaf = cases.run_forward(*cases.on_device((params, x)), spec, execution)
        np.testing.assert_array_equal(leaf[3], [0, 0])


@pytest.mark.parametrize("routing", ["hard", "straight_through"])
def test_nan_threshold_goes_left(routing, rng):
    """The decision is NaN, the output is not."""
    spec = cases.make_spec(routing, P=1, D=2, W=1)
    params, x, _ = cases.grid_case(rng, spec)
    params["threshold"][0, 0] = np.nan
    want = oracle.forward(params, x, spec)
    assert want.leaf.max() <= 1
    for execution in cases.EXECUTIONS:
        y, leaf = cases.run_forward(*cases.on_device((params, x)), spec, execution)
        np.testing.assert_array_equal(leaf, want.leaf)
        assert_near(y, want.y, execution)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("execution", ALL_FORMS)
def test_decisions_differ_only_within_the_rounding_bound(execution, dtype, rng):
    """Not a tolerance on everything: a leaf may differ only where |r| is below what float32 sums can resolve.

    And along the paths taken, outputs and gradients are right to the precision of the dtype.
    """
    spec = cases.make_spec("hard", P=4, D=5, W=1, activation="gelu")
    params, x, dy = cases.random_case(rng, spec, T=64, E=24, dtype=dtype)
    # Half of the tokens are moved onto the boundary of a root whose threshold is large: |r| is tiny there,
    # the product <w, x> is not, and rounding that to bfloat16 would turn many decisions.
    params["threshold"] = params["threshold"].at[0, 0].set(4.0)
    w, offset = np.asarray(params["w_in"][0, 0], np.float64), 4.0 - float(params["b_in"][0, 0])
    near = np.asarray(x[:32], np.float64)
    near -= ((near @ w - offset) / (w @ w))[:, None] * w
    x = jnp.concatenate([jnp.asarray(near, dtype), x[32:]])
    y, leaf, grads, dx = run_backward(params, x, dy, spec, execution)
    assert y.dtype == dtype
    for size, bound in oracle.decision_margin(params, x, spec, leaf):
        assert size <= bound, f"decided against |r| = {size:.2e}, bound {bound:.2e}"
    tolerance = 2e-5 if dtype == jnp.float32 else FOUR_ROUNDINGS
    assert_near(y, oracle.forward(params, x, spec, leaf).y, "y", tolerance)
    want, want_dx = oracle.backward(params, x, spec, dy, leaf)
    assert_near(dx, want_dx, "dx", tolerance)
    assert_same_gradients(grads, want, execution, tolerance)


@pytest.mark.parametrize("routing", ["straight_through", "continuous_min"])
def test_bfloat16_follows_the_oracle(routing, rng):
    """Grid values are exact in bfloat16 too, so decisions must agree; the rest to four roundings."""
    spec = cases.make_spec(routing, P=2, D=3, W=2, S=2, act_site="node", activation="tanh")
    params, x, dy = cases.grid_case(rng, spec)
    threshold = jnp.asarray(params["threshold"])
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params) | {"threshold": threshold}
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    want = oracle.forward(params, x, spec)
    grads, dx = oracle.backward(params, x, spec, dy)
    for execution in cases.EXECUTIONS:
        if differentiable(spec, execution):
            y, leaf, got_grads, got_dx = run_backward(params, x, dy, spec, execution)
            assert_near(got_dx, dx, execution, FOUR_ROUNDINGS)
            assert_same_gradients(got_grads, grads, execution, FOUR_ROUNDINGS)
        else:
            y, leaf = cases.run_forward(params, x, spec, execution)
        np.testing.assert_array_equal(leaf, want.leaf)
        assert_near(y, want.y, execution, FOUR_ROUNDINGS)


@pytest.mark.parametrize("execution", cases.EXECUTIONS)
def test_float32_weights_under_bfloat16_tokens(execution, rng):
    """Mixed precision: weights are cast to x's dtype, gradients come back in the weights' own."""
    spec = cases.make_spec("hard", P=2, D=2, W=2, S=1)
    params, x, dy = cases.on_device(cases.grid_case(rng, spec))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    y, _, grads, dx = run_backward(params, x, dy, spec, execution)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("execution", ["gather", "grouped"])
def test_straight_through_is_differentiated_by_masked_only(execution, rng):
    spec = cases.make_spec("straight_through", P=2, D=2)
    params, x, dy = cases.on_device(cases.grid_case(rng, spec))
    hard = cases.make_spec("hard", P=2, D=2)
    y, y_hard = (cases.run_forward(params, x, s, execution)[0] for s in (spec, hard))
    np.testing.assert_array_equal(y, y_hard)
    with pytest.raises(InputError, match="masked"):
        run_backward(params, x, dy, spec, execution)


@pytest.mark.parametrize("T, chosen", [(1, "gather"), (64, "masked"), (512, "grouped")])
@pytest.mark.parametrize("routing", ["straight_through", "continuous_product"])
def test_the_automatic_choice_can_be_differentiated(routing, T, chosen, rng):
    spec = cases.make_spec(routing, P=1, D=3, W=2)
    assert pick_implementation(spec, T, "cpu") == chosen
    check(*cases.grid_case(rng, spec, T=T), spec, executions=(None,))


def test_unknown_execution_lists_the_known_ones(rng):
    spec = cases.make_spec()
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match="masked.*gather.*grouped"):
        tree_ffn(params, x, spec, "sparse")
