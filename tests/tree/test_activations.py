"""All activations and their derivatives against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tree_ffn.errors import InputError
from tree_ffn.tree import ACTIVATIONS, activation

POINTS = np.concatenate([np.linspace(-6, 6, 241), [-30.0, 30.0, 1e-3, -1e-3]]).astype(np.float32)
AT_ZERO = {"relu": 0.0, "relu2": 0.0, "abs": 0.0, "identity": 1.0, "tanh": 1.0, "softplus": 0.5, "silu": 0.5}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name, jit_as_users):
    act = activation(name)
    points = POINTS[POINTS != 0]
    value, derivative = oracle.ACTIVATIONS[name](points.astype(np.float64))
    np.testing.assert_allclose(jit_as_users(act)(points), value, rtol=1e-5, atol=2e-6)
    slopes = jit_as_users(jax.vmap(jax.grad(act)))(points)
    np.testing.assert_allclose(slopes, derivative, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("name", AT_ZERO)
def test_derivative_at_zero(name):
    assert float(jax.grad(activation(name))(0.0)) == AT_ZERO[name]
    assert float(jax.grad(activation(name))(-0.0)) == AT_ZERO[name]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtype_is_kept_and_large_inputs_are_finite(name):
    z = jnp.array([-1e4, 0.0, 1e4], jnp.bfloat16)
    assert activation(name)(z).dtype == jnp.bfloat16
    assert np.all(np.isfinite(activation(name)(z.astype(jnp.float32))))
    assert np.all(np.isfinite(jax.vmap(jax.grad(activation(name)))(z.astype(jnp.float32))))


def test_slope_of_leaky_relu():
    assert float(activation("leaky_relu")(-2.0)) == pytest.approx(-0.02)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="activation: 'swish' is not known; use one of: gelu, .*softplus"):
        activation("swish")
