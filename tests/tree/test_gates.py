"""Gates of decisions against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases
from tree_ffn.tree import gates


@pytest.mark.parametrize("routing_name", ["continuous_min", "continuous_product"])
def test_gate_of_children(routing_name):
    spec = cases.make_spec(routing_name, kappa=2.0)
    gate, r = np.float32([1.0, 0.5, 0.1]), np.float32([-0.3, 0.7, 0.9])
    c = 1 - np.exp(-2.0 * np.abs(r))
    want = np.minimum(gate, c) if routing_name == "continuous_min" else gate * c
    np.testing.assert_allclose(gates.child_gate(jnp.asarray(gate), jnp.asarray(r), spec), want, rtol=1e-6)


@pytest.mark.parametrize("routing_name", ["continuous_min", "continuous_product"])
def test_slope_of_a_gate_is_0_at_the_boundary(routing_name):
    spec = cases.make_spec(routing_name)
    assert jax.grad(lambda r: gates.child_gate(jnp.float32(1.0), r, spec))(0.0) == 0.0


@pytest.mark.parametrize("order", [1, 2])
def test_norm_of_gates(order, rng):
    gate = rng.uniform(size=(5, 7)).astype(np.float32)
    want = np.linalg.norm(np.float64(gate), ord=order, axis=-1, keepdims=True)
    np.testing.assert_allclose(gates.gate_norm(jnp.asarray(gate), order), want, rtol=1e-6)
    slope = jax.grad(lambda gate: gates.gate_norm(gate, order).sum())(jnp.asarray(gate))
    np.testing.assert_allclose(slope, np.ones_like(gate) if order == 1 else gate / want, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_gates_that_underflow_have_a_norm(order):
    unit = lambda gate: gate / gates.gate_norm(gate, order)
    small, none = jnp.full((1, 4), 1e-30, jnp.float32), jnp.zeros((1, 4), jnp.float32)
    np.testing.assert_allclose(unit(small), np.full((1, 4), 0.25 if order == 1 else 0.5), rtol=1e-6)
    assert not np.any(unit(none))
    assert np.all(np.isfinite(jax.grad(lambda gate: gates.gate_norm(gate, order).sum())(none)))


def test_at_equal_gates_the_ancestor_keeps_the_gradient():
    spec = cases.make_spec("continuous_min")
    chain = lambda r: gates.child_gate(gates.child_gate(jnp.float32(1.0), r[0], spec), r[1], spec)
    slopes = jax.grad(chain)(jnp.array([0.4, -0.4], jnp.float32))
    assert slopes[0] > 0 and slopes[1] == 0
