"""Sign balancing against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases
from tree_ffn.tree import TreeShape, TreeSpec, balance_update, routing
from tree_ffn.tree.layout import layout_of


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
    layout, threshold = layout_of(spec), jnp.zeros((1, 3))
    for _ in range(60):
        logits = routing.gathered(z - threshold[None, :, :1], layout)
        threshold = balance_update(threshold, routing.walk(logits, layout, 500), spec)
    assert abs(float(threshold[0, 0]) - float(jnp.median(z))) < 0.1


@pytest.mark.parametrize("fields", [{"balance": "none"}, {"balance": "sign", "D": 0}])
def test_nothing_to_balance(fields, rng):
    spec = cases.make_spec(**({"P": 2, "D": 2} | fields))
    threshold = jnp.asarray(cases.on_grid(rng, 2, spec.shape.n_nodes))
    leaf = jnp.zeros((5, 2), jnp.int32)
    np.testing.assert_array_equal(balance_update(threshold, leaf, spec), threshold)
