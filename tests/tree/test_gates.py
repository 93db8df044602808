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


def test_at_equal_gates_the_ancestor_keeps_the_gradient():
    spec = cases.make_spec("continuous_min")
    chain = lambda r: gates.child_gate(gates.child_gate(jnp.float32(1.0), r[0], spec), r[1], spec)
    slopes = jax.grad(chain)(jnp.array([0.4, -0.4], jnp.float32))
    assert slopes[0] > 0 and slopes[1] == 0
