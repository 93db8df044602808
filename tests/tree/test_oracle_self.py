"""The oracle against central differences in float64, and against itself evaluated literally."""

import dataclasses

import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.tree import ACTIVATIONS


def loss(params, x, spec, dy, leaf=None):
    return float(np.vdot(dy, oracle.forward(params, x, spec, leaf).y))


def differences(params, x, spec, dy, leaf, h=1e-5):
    """d loss / d each trained weight and x by central differences; paths are held where `leaf` is given."""

    def of(array):
        slopes = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + h
            up = loss(params, x, spec, dy, leaf)
            array[index] = kept - h
            slopes[index] = (up - loss(params, x, spec, dy, leaf)) / (2 * h)
            array[index] = kept
        return slopes

    grads = {name: of(params[name]) for name in ("w_in", "b_in", "w_out", "b_out")}
    if "shared" in params:
        grads["shared"] = {name: of(w) for name, w in params["shared"].items()}
    return grads, of(x)


def case_of(rng, spec, T=3, E=3):
    params, x, dy = cases.grid_case(rng, spec, T=T, E=E)
    return oracle.to_float64(params), x.astype(np.float64), dy.astype(np.float64)


def assert_close(got, want):
    if isinstance(want, tuple):
        for one_got, one_want in zip(got, want):
            assert_close(one_got, one_want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name])
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name, rng):
    z, h = rng.uniform(-4, 4, 200), 1e-6
    act = lambda z: oracle.ACTIVATIONS[name](z, 0.125)
    np.testing.assert_allclose(act(z)[1], (act(z + h)[0] - act(z - h)[0]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("site", ["node", "sum"])
@pytest.mark.parametrize("routing", ["hard", "continuous_min", "continuous_product"])
def test_gradients_are_those_of_the_oracles_own_output(routing, site, rng):
    """Decisions included: none flips within the step, since |r| is at least 1/64."""
    spec = cases.make_spec(routing, P=2, D=2, W=2, S=1, act_site=site, activation="gelu_tanh")
    params, x, dy = case_of(rng, spec)
    params["threshold"] += rng.uniform(-1 / 64, 1 / 64, params["threshold"].shape)
    assert_close(oracle.backward(params, x, spec, dy), differences(params, x, spec, dy, None))


@pytest.mark.parametrize("site", ["node", "sum"])
def test_straight_through_literally(site, rng):
    """beta s'(beta r) <dL/dsum, V(right) - V(left)>, each V from a layer that is only the subtree's path."""
    spec = cases.make_spec("straight_through", P=1, D=2, W=2, activation="silu", act_site=site)
    hard = dataclasses.replace(spec, routing="hard")
    params, x, dy = case_of(rng, spec, T=4)
    grads, _ = oracle.backward(params, x, spec, dy)
    without, _ = oracle.backward(params, x, hard, dy)
    silu = lambda z: oracle.ACTIVATIONS["silu"](z, 0)
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
            s = 1 / (1 + np.exp(-spec.beta * r[n]))
            want[n] += spec.beta * s * (1 - s) * (d_sum @ (value[2 * n + 2] - value[2 * n + 1])) * x_E
    got = grads["w_in"][0] - without["w_in"][0]
    np.testing.assert_allclose(got[::2], want, atol=1e-12)
    assert not np.any(got[1::2])
    assert_close(grads["w_out"], without["w_out"])


def test_straight_through_is_the_limit_of_a_smooth_decision(rng):
    """One decision: the slope that y = V(left) + s(beta r) (V(right) - V(left)) has through s alone."""
    spec = cases.make_spec("straight_through", P=1, D=1, W=1, activation="tanh")
    params, x, dy = case_of(rng, spec, T=1)
    threshold = params["threshold"]

    def smooth(shift):
        z = params["w_in"][0] @ x[0] + params["b_in"][0]
        leaves = np.tanh(z[1:, None]) * params["w_out"][0, 1:]
        s = 1 / (1 + np.exp(-spec.beta * (z[0] + shift - threshold[0, 0])))
        return dy[0] @ (leaves[0] + s * (leaves[1] - leaves[0]))

    hard = dataclasses.replace(spec, routing="hard")
    extra = oracle.backward(params, x, spec, dy)[0]["b_in"] - oracle.backward(params, x, hard, dy)[0]["b_in"]
    np.testing.assert_allclose(extra[0, 0], (smooth(1e-6) - smooth(-1e-6)) / 2e-6, rtol=1e-6)


def test_frozen_routers_get_no_gradient_and_decide(rng):
    spec = cases.make_spec(P=1, D=2, W=1, router="frozen")
    params, x, dy = case_of(rng, spec)
    assert_close(oracle.backward(params, x, spec, dy), differences(params, x, spec, dy, None))
    r = params["router"]["w"][0] @ x.T - params["threshold"][0, :3, None]
    nodes = [1 + int(r[0, t] > 0) for t in range(len(x))]
    leaves = [2 * n + 1 + int(r[n, t] > 0) - 3 for t, n in enumerate(nodes)]
    assert oracle.forward(params, x, spec).leaf[:, 0].tolist() == leaves


def test_units_of_a_node():
    spec = cases.make_spec(D=2, W="per_level")  # widths 2, 1, 2
    rows = [oracle.rows_of(spec, node) for node in range(7)]
    assert [(r.start, r.stop) for r in rows] == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
