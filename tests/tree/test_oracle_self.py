"""The oracles against central differences in float64, and against themselves evaluated literally."""

import dataclasses

import numpy as np
import pytest

from tests import leaf_oracle, oracle
from tests.tree import cases
from tree_ffn.tree import ACTIVATIONS


def differences(loss, arrays, h=1e-5):
    """d loss() / d each number of float64 arrays, which `loss` reads, by central differences."""

    def of(array):
        slopes = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + h
            up = loss()
            array[index] = kept - h
            slopes[index] = (up - loss()) / (2 * h)
            array[index] = kept
        return slopes

    return {name: of(array) for name, array in arrays.items()}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-7, err_msg=name)


def case_of(rng, spec, T=3, E=3):
    params, x, dy = cases.grid_case(rng, spec, T=T, E=E)
    return oracle.to_float64(params), x.astype(np.float64), dy.astype(np.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name, rng):
    z, h = rng.uniform(-4, 4, 200), 1e-6
    act = oracle.ACTIVATIONS[name]
    np.testing.assert_allclose(act(z)[1], (act(z + h)[0] - act(z - h)[0]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("router", ["first_unit", "frozen"])
@pytest.mark.parametrize("site", ["node", "sum"])
def test_gradients_of_paths(router, site, rng):
    """Decisions included: none flips within the step, since |r| is at least 1/64."""
    spec = cases.make_spec(P=2, D=2, W=2, act_site=site, activation="gelu_tanh", router=router)
    params, x, dy = case_of(rng, spec)
    params["threshold"] += rng.uniform(-1 / 64, 1 / 64, params["threshold"].shape)
    grads, dx = oracle.backward(params, x, spec, dy)
    trained = {name: params[name] for name in grads}
    loss = lambda: float(np.vdot(dy, oracle.forward(params, x, spec).y))
    assert_close({**grads, "x": dx}, differences(loss, {**trained, "x": x}))


@pytest.mark.parametrize("name", cases.LEAVES)
def test_gradients_of_leaves(name, rng):
    spec = dataclasses.replace(cases.LEAVES[name], activation="gelu_tanh")
    params, x, dy = cases.leaf_case(rng, spec, T=2, E=3)
    ids = cases.token_ids(2)
    _, _, grads = leaf_oracle.leaf_layer(params, x, spec, ids, dy, leak=0.3)
    trained = {part: params[part] for part in grads if part != "x"}
    loss = lambda: float(np.vdot(dy, leaf_oracle.leaf_layer(params, x, spec, ids, leak=0.3)[0]))
    assert_close(grads, differences(loss, {**trained, "x": x}))


@pytest.mark.parametrize("site", ["node", "sum"])
def test_straight_through_literally(site, rng):
    """s'(r) <dL/dsum, V(right) - V(left)>, each V from a layer that is only the subtree's path."""
    spec = cases.make_spec("straight_through", P=1, D=2, W=2, activation="silu", act_site=site)
    hard = dataclasses.replace(spec, routing="hard")
    params, x, dy = case_of(rng, spec, T=4)
    grads, _ = oracle.backward(params, x, spec, dy)
    without, _ = oracle.backward(params, x, hard, dy)
    silu = oracle.ACTIVATIONS["silu"]
    unit = lambda z: silu(z)[0] if site == "node" else z
    w_in, b_in, w_out, threshold = (params[k][0] for k in ("w_in", "b_in", "w_out", "threshold"))
    want = np.zeros((7, 3))
    for x_E, dy_E in zip(x, dy):
        z = w_in @ x_E + b_in
        out = [unit(z[2 * n : 2 * n + 2]) @ w_out[2 * n : 2 * n + 2] for n in range(7)]
        r = z[::2] - threshold
        value = {n: out[n] for n in range(3, 7)}
        for n in (1, 2, 0):
            value[n] = out[n] + value[2 * n + 1 + int(r[n] > 0)]
        d_sum = dy_E if site == "node" else dy_E * silu(value[0])[1]
        for n in (0, 1 + int(r[0] > 0)):
            s = 1 / (1 + np.exp(-r[n]))
            want[n] += s * (1 - s) * (d_sum @ (value[2 * n + 2] - value[2 * n + 1])) * x_E
    got = grads["w_in"][0] - without["w_in"][0]
    np.testing.assert_allclose(got[::2], want, atol=1e-12)
    assert not np.any(got[1::2])
    np.testing.assert_array_equal(grads["w_out"], without["w_out"])


def test_straight_through_is_the_limit_of_a_smooth_decision(rng):
    """One decision: the slope that y = V(left) + s(r) (V(right) - V(left)) has through s alone."""
    spec = cases.make_spec("straight_through", P=1, D=1, W=1, activation="tanh")
    params, x, dy = case_of(rng, spec, T=1)

    def smooth(shift):
        z = params["w_in"][0] @ x[0] + params["b_in"][0]
        leaves = np.tanh(z[1:, None]) * params["w_out"][0, 1:]
        s = 1 / (1 + np.exp(-(z[0] + shift - params["threshold"][0, 0])))
        return dy[0] @ (leaves[0] + s * (leaves[1] - leaves[0]))

    hard = dataclasses.replace(spec, routing="hard")
    extra = oracle.backward(params, x, spec, dy)[0]["b_in"] - oracle.backward(params, x, hard, dy)[0]["b_in"]
    np.testing.assert_allclose(extra[0, 0], (smooth(1e-6) - smooth(-1e-6)) / 2e-6, rtol=1e-6)


def test_units_of_a_node():
    spec = cases.make_spec(D=2, W="per_level")  # widths 2, 1, 2
    rows = [oracle.rows_of(spec, node) for node in range(7)]
    assert [(r.start, r.stop) for r in rows] == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
