"""Across a decision boundary `continuous` routing does not jump; `hard` does (the control)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases


@functools.partial(jax.jit, static_argnames=("spec", "execution"))
def leaves(params, x, spec, execution):
    return cases.layer(params, x, spec, execution)[1].leaf_TP[:, 0]


@functools.partial(jax.jit, static_argnames=("spec", "execution"))
def across_boundaries(params, a, b, spec, execution):
    """Moves a and b [T, E] together until no float lies between, their leaves differing all the while.

    Returns:
      The last a and b, and y at both.
    """
    layer = lambda x: cases.layer(params, x, spec, execution)
    start = layer(a)[1].leaf_TP

    def halve(_, ends):
        a, b = ends
        middle = (a + b) / 2
        stays = layer(middle)[1].leaf_TP == start
        return jnp.where(stays, middle, a), jnp.where(stays, b, middle)

    a, b = jax.lax.fori_loop(0, 40, halve, (a, b))
    return a, b, layer(a)[0], layer(b)[0]


def jumps(rng, routing, act_site, execution):
    """Largest |y(a) - y(b)| at each of 24 boundaries of one deep tree."""
    spec = cases.make_spec(routing, P=1, D=4, W=2, act_site=act_site, kappa=2.0)
    params, x, _ = cases.random_case(rng, spec, T=64, E=8)
    x_a, x_b = np.asarray(x), np.roll(x, 1, axis=0)
    leaf = np.asarray(leaves(params, x, spec, execution))
    differ = np.flatnonzero(leaf != np.roll(leaf, 1))[:24]
    assert len(differ) == 24
    a, b, y_a, y_b = across_boundaries(params, x_a[differ], x_b[differ], spec, execution)
    assert np.max(np.abs(a - b)) < 1e-6
    assert np.all(leaves(params, a, spec, execution) != leaves(params, b, spec, execution))
    return np.max(np.abs(np.asarray(y_a - y_b)), axis=-1)


@pytest.mark.parametrize("act_site", ["node", "sum"])
@pytest.mark.parametrize("routing", ["continuous_min", "continuous_product"])
def test_continuous_does_not_jump(routing, act_site, rng):
    assert jumps(rng, routing, act_site, "masked").max() < 1e-4


@pytest.mark.parametrize("execution", ["gather", "grouped"])
def test_nor_in_another_execution(execution, rng):
    assert jumps(rng, "continuous_min", "node", execution).max() < 1e-4


@pytest.mark.parametrize("act_site", ["node", "sum"])
def test_hard_jumps(act_site, rng):
    """The control: at most boundaries by much more than any rounding."""
    assert np.median(jumps(rng, "hard", act_site, "masked")) > 1e-2
