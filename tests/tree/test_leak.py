"""Leaks: what units off the path add in training, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tests.tree.test_executions import assert_near, assert_same_gradients
from tree_ffn.errors import InputError
from tree_ffn.tree import tree_ffn

LAYERS = [
    {"P": 2, "D": 2, "W": "per_level", "S": 2},
    {"routing": "straight_through", "P": 2, "D": 3},
    {"routing": "straight_through", "D": 2, "W": 3, "act_site": "sum", "activation": "tanh"},
    {"routing": "straight_through", "D": 2, "W": "per_level", "router": "silent"},
    {"router": "frozen", "D": 2, "activation": "abs"},
    {"routing": "continuous", "P": 2, "D": 3},
    {"routing": "continuous", "D": 2, "W": 3, "openness": "logistic", "gate": "product", "act_site": "sum"},
    {"routing": "continuous", "D": 2, "W": "per_level", "router": "silent", "gate": "product"},
    {
        "routing": "continuous",
        "D": 2,
        "W": 2,
        "router": "silent",
        "openness": "logistic",
        "renormalise": True,
        "gate_norm": 2,
    },
    {
        "routing": "continuous",
        "D": 3,
        "router": "silent",
        "openness": "logistic",
        "gate": "product",
        "beam": 2,
    },
]


@functools.partial(jax.jit, static_argnames="spec")
def run(params, x, dy, leak, spec):
    """Output, leaves and gradients with a leak."""
    leaking = lambda params, x: tree_ffn(params, x, spec, "masked", leak=leak)
    y, vjp, info = jax.vjp(leaking, params, x, has_aux=True)
    return y, info.leaf_TP, *vjp(dy)


@pytest.mark.parametrize("fields", LAYERS, ids=str)
@pytest.mark.parametrize("leak", [0.25, 1.0])
def test_a_leaking_layer_is_the_oracles(rng, fields, leak):
    spec = cases.make_spec(**fields)
    params, x, dy = cases.grid_case(rng, spec)
    want = oracle.forward(params, x, spec, leak=leak)
    grads, dx = oracle.backward(params, x, spec, dy, leak=leak)
    y, leaf, got_grads, got_dx = run(*cases.on_device((params, x, dy)), jnp.float32(leak), spec)
    np.testing.assert_array_equal(leaf, want.leaf)
    assert_near(y, want.y, "y")
    assert_near(got_dx, dx, "dx")
    assert_same_gradients(got_grads, grads, "leaking")


@pytest.mark.slow
def test_a_leak_of_nothing_is_the_layer(rng):
    spec = cases.make_spec("straight_through", P=2, D=3, W=2)
    params, x, dy = cases.on_device(cases.random_case(rng, spec))
    y, vjp, _ = jax.vjp(lambda p, x: tree_ffn(p, x, spec, "masked"), params, x, has_aux=True)
    leaking = run(params, x, dy, jnp.float32(0), spec)
    assert_near(leaking[0], y, "y", 1e-6)
    for got, want in zip(jax.tree.leaves(leaking[2:]), jax.tree.leaves(vjp(dy))):
        assert_near(got, want, "gradient", 1e-6)


def test_a_leak_that_has_ended_is_none_of_units_that_overflow_either(rng):
    spec = cases.make_spec(P=1, D=1, activation="relu2")
    params, x, _ = cases.on_device(cases.random_case(rng, spec))
    params["b_in"] = params["b_in"].at[0, 1].set(1e20)  # the left leaf's, whose square is no number
    y, info = tree_ffn(params, x, spec, "masked", leak=jnp.float32(0))
    went_right = np.asarray(info.leaf_TP[:, 0] == 1)
    assert np.any(went_right) and np.all(np.isfinite(y[went_right]))


def test_what_leaks_wholly_is_dense(rng):
    spec = cases.make_spec(P=2, D=3, W=2, activation="relu")
    params, x, _ = cases.random_case(rng, spec)
    y, _ = tree_ffn(cases.on_device(params), jnp.asarray(x), spec, leak=jnp.float32(1))
    w_in, b_in, w_out = (np.float64(params[name]).reshape(2 * 30, -1) for name in ("w_in", "b_in", "w_out"))
    x = np.float64(x)
    want = np.maximum(x @ w_in.T + b_in.T, 0) @ w_out + np.float64(params["b_out"])
    assert_near(y, want, "y")


@pytest.mark.parametrize("execution", ["gather", "grouped"])
def test_executions_of_paths_refuse_a_leak(rng, execution):
    spec = cases.make_spec(P=1, D=1)
    params, x, _ = cases.on_device(cases.random_case(rng, spec))
    with pytest.raises(InputError, match=f"implementation: '{execution}' .*no unit off the path.*'masked'"):
        tree_ffn(params, x, spec, execution, leak=jnp.float32(0.5))
