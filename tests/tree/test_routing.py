"""Decisions and the straight-through surrogate against NumPy; specs that cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import TreeShape, TreeSpec, on_path, routing
from tree_ffn.tree.layout import layout_of


@pytest.mark.parametrize("how", ["gathered", "masked"])
def test_walk(rng, how):
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
    layout = layout_of(TreeSpec(TreeShape(r.shape[1], 3)))
    logits = {
        "gathered": routing.gathered(jnp.asarray(r), layout),
        "masked": functools.partial(on_path.logits_at, jnp.asarray(r)),
    }
    leaf = routing.walk(logits[how], layout, r.shape[0])
    assert leaf.dtype == jnp.int32
    np.testing.assert_array_equal(leaf, want)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_surrogate_has_the_slope_of_a_sigmoid(beta):
    r = np.array([-200.0, -2.0, -0.1, 0.0, 0.1, 2.0, 200.0], np.float32)
    slopes = routing.surrogate_slope(jnp.asarray(r), beta)
    e = np.exp(-np.abs(beta * r.astype(np.float64)))
    np.testing.assert_allclose(slopes, beta * e / (1 + e) ** 2, rtol=1e-5, atol=1e-7)


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
        ({"kappa": float("inf")}, "kappa: inf .*above 0"),
        ({"kappa": "1"}, "kappa: '1' .*a number above 0"),
        ({"balance_rate": -0.1}, "balance_rate: -0.1 .*at least 0"),
        ({"hash_levels": 2}, "hash_levels: 2 .*at most depth = 1"),
        ({"hash_levels": -1}, "hash_levels: -1 .*at least 0"),
        ({"hash_levels": 1, "routing": "continuous"}, "routing: 'continuous' .*hash_levels 1.*hard"),
        ({"hash_levels": 1, "balance": "sign"}, "balance: 'sign' .*hash_levels 1.*none"),
        ({"openness": "linear"}, "openness: 'linear' .*exponential, logistic"),
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
