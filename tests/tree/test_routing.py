"""Decisions, gates, the straight-through surrogate and sign balancing, each against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import TreeShape, TreeSpec, balance_update, routing


def test_walk(rng):
    """Ties and NaN go left."""
    r = rng.normal(size=(40, 2, 7)).astype(np.float32)
    r[rng.random(r.shape) < 0.2] = 0.0
    r[rng.random(r.shape) < 0.2] = np.nan
    want = np.zeros((40, 2), int)
    for t in range(40):
        for p in range(2):
            n = 0
            for _ in range(3):
                n = 2 * n + 2 if r[t, p, n] > 0 else 2 * n + 1
            want[t, p] = n - 7
    leaf = routing.walk(jnp.asarray(r), TreeSpec(TreeShape(r.shape[1], 3)))
    assert leaf.dtype == jnp.int32
    np.testing.assert_array_equal(leaf, want)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_surrogate_has_the_slope_of_a_sigmoid(beta):
    r = np.array([-200.0, -2.0, -0.1, 0.0, 0.1, 2.0, 200.0], np.float32)
    slopes = routing.surrogate_slope(jnp.asarray(r), beta)
    e = np.exp(-np.abs(beta * r.astype(np.float64)))
    np.testing.assert_allclose(slopes, beta * e / (1 + e) ** 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("routing_name", ["continuous_min", "continuous_product"])
def test_gate_of_children(routing_name):
    spec = cases.make_spec(routing_name, kappa=2.0)
    gate, r = np.float32([1.0, 0.5, 0.1]), np.float32([-0.3, 0.7, 0.9])
    c = 1 - np.exp(-2.0 * np.abs(r))
    want = np.minimum(gate, c) if routing_name == "continuous_min" else gate * c
    np.testing.assert_allclose(routing.child_gate(jnp.asarray(gate), jnp.asarray(r), spec), want, rtol=1e-6)


@pytest.mark.parametrize("routing_name", ["continuous_min", "continuous_product"])
def test_slope_of_a_gate_is_0_at_the_boundary(routing_name):
    spec = cases.make_spec(routing_name)
    assert jax.grad(lambda r: routing.child_gate(jnp.float32(1.0), r, spec))(0.0) == 0.0


def test_at_equal_gates_the_ancestor_keeps_the_gradient():
    spec = cases.make_spec("continuous_min")
    chain = lambda r: routing.child_gate(routing.child_gate(jnp.float32(1.0), r[0], spec), r[1], spec)
    slopes = jax.grad(chain)(jnp.array([0.4, -0.4], jnp.float32))
    assert slopes[0] > 0 and slopes[1] == 0


def test_decision_logits_carry_no_gradient(rng):
    spec = cases.make_spec(P=2, D=2, W=2)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    r = routing.decision_logits(params, x, spec)
    paths = oracle.forward(params, x, spec).paths
    for t in range(len(x)):
        for p in range(2):
            for step in paths[t][p][:2]:
                assert float(r[t, p, step.node]) == step.r
    grads = jax.grad(lambda params: jnp.sum(routing.decision_logits(params, x, spec)))(params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def balanced(threshold, leaf, rate, depth):
    """threshold += rate * sign(visits right - visits left), node by node."""
    threshold = threshold.copy()
    for p in range(threshold.shape[0]):
        for n in range(2**depth - 1):
            level = int(np.log2(n + 1))
            here = leaf[:, p] >> (depth - level) == n - (2**level - 1)
            right = leaf[here, p] >> (depth - level - 1) & 1
            threshold[p, n] += rate * np.sign(right.sum() - (1 - right).sum())
    return threshold


@pytest.mark.parametrize("T", [1, 40])
def test_balance_update(T, rng):
    spec = TreeSpec(TreeShape(3, 3, 2), balance="sign", balance_rate=0.125)
    threshold = cases.on_grid(rng, 3, 15)
    leaf = rng.integers(0, 8, (T, 3), np.int32)
    leaf[:, 2] = 5  # one leaf takes all: unvisited nodes stay
    got = balance_update(jnp.asarray(threshold), jnp.asarray(leaf), spec)
    np.testing.assert_array_equal(got, balanced(threshold, leaf, 0.125, 3))
    np.testing.assert_array_equal(got[:, 7:], threshold[:, 7:])


def test_balance_evens_out_a_skewed_router(rng):
    """The sign of the rule: a bias that sends most tokens right is undone."""
    spec = cases.make_spec(P=1, D=1, W=1, balance="sign", balance_rate=0.05)
    z = jnp.asarray(rng.normal(1.5, 1.0, (500, 1, 1)), jnp.float32)
    threshold = jnp.zeros((1, 3))
    for _ in range(60):
        threshold = balance_update(threshold, routing.walk(z - threshold[None, :, :1], spec), spec)
    assert abs(float(threshold[0, 0]) - float(jnp.median(z))) < 0.1


def test_balance_floor_spares_what_lives():
    """Visits of the children of four nodes: 0 + 9, 3 + 7, 2 + 8 and 4 + 4, under a floor of a fifth."""
    left, right = jnp.array([0, 7, 2, 4]), jnp.array([9, 3, 8, 4])
    step = lambda floor: routing.balance_step(
        left, right, TreeSpec(TreeShape(1, 1), balance_rate=0.5, balance_floor=floor)
    )
    np.testing.assert_array_equal(step(0.2), [0.5, 0, 0, 0])
    np.testing.assert_array_equal(step(0.25), [0.5, 0, 0.5, 0])
    np.testing.assert_array_equal(step(0.5), [0.5, -0.5, 0.5, 0])


@pytest.mark.parametrize("fields", [{"balance": "none"}, {"balance": "sign", "D": 0}])
def test_nothing_to_balance(fields, rng):
    spec = cases.make_spec(**({"P": 2, "D": 2} | fields))
    threshold = jnp.asarray(cases.on_grid(rng, 2, spec.shape.n_nodes))
    leaf = jnp.zeros((5, 2), jnp.int32)
    np.testing.assert_array_equal(balance_update(threshold, leaf, spec), threshold)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"routing": "soft"}, "routing: 'soft' .*hard, straight_through, continuous"),
        ({"gate": "max"}, "gate: 'max' .*min, product"),
        ({"act_site": "leaf"}, "act_site: 'leaf' .*node, sum"),
        ({"activation": "swish"}, "activation: 'swish' .*gelu"),
        ({"balance": "aux"}, "balance: 'aux' .*none, sign"),
        ({"router": "token"}, "router: 'token' .*first_unit, silent, frozen"),
        ({"kappa": 0.0}, "kappa: 0.0 .*above 0"),
        ({"beta": -1.0}, "beta: -1.0 .*above 0"),
        ({"kappa": float("nan")}, "kappa: nan"),
        ({"balance_rate": -0.1}, "balance_rate: -0.1 .*at least 0"),
        ({"hash_levels": 2}, "hash_levels: 2 .*at most depth = 1"),
        ({"hash_levels": -1}, "hash_levels: -1 .*at least 0"),
        ({"hash_levels": 1, "routing": "continuous"}, "routing: 'continuous' .*hash_levels 1.*hard"),
        ({"hash_levels": 1, "balance": "sign"}, "balance: 'sign' .*hash_levels 1.*none"),
        ({"openness": "linear"}, "openness: 'linear' .*exponential, logistic"),
        ({"balance_floor": 0.6}, "balance_floor: 0.6 .*above 0, at most 0.5"),
        ({"balance_floor": 0.0}, "balance_floor: 0.0"),
        ({"leak": 1.5}, "leak: 1.5 .*from 0 to 1"),
        ({"leak_share": 0.0}, "leak_share: 0.0 .*above 0, at most 1"),
        ({"gate_norm": 3}, "gate_norm: 3 .*1, 2"),
        ({"beam": 0}, "beam: 0"),
        ({"beam": 2}, "beam: 2 cannot be used with routing 'hard', openness 'exponential'"),
        (
            {"renormalise": True},
            "renormalise: True .*'hard' and openness 'exponential'.*'continuous' and 'logistic'",
        ),
        ({"router": "silent", "routing": "hard"}, "routing: 'hard' .*silent.*straight_through"),
        ({"router": "frozen", "routing": "continuous"}, "routing: 'continuous' .*frozen.*hard"),
    ],
)
def test_specs_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        TreeSpec(TreeShape(1, 1), **fields)
