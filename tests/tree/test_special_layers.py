"""Known layers that must fall out of the same code, each written here from its own definition."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import erf

from tests.tree import cases


@functools.partial(
    jax.jit, static_argnames=("spec", "execution"), compiler_options={"xla_backend_optimization_level": 0}
)
def run(params, x, spec, execution):
    return cases.layer(params, x, spec, execution)[0]


def assert_all_executions(params, x, spec, want):
    for execution in cases.EXECUTIONS:
        got = run(*cases.on_device((params, x)), spec, execution)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=execution)


def gelu(z):
    return 0.5 * z * (1 + erf(z / np.sqrt(2)))


def mlp(x, w_in, b_in, w_out, act=np.tanh):
    return act(x @ w_in.T + b_in) @ w_out


@pytest.mark.parametrize("routing", ["hard", "continuous_min"])
def test_depth_0_is_a_dense_layer(routing, rng):
    """P W + S units, whatever the routing."""
    spec = cases.make_spec(routing, P=3, D=0, W=4, S=2, activation="tanh")
    params, x, _ = cases.grid_case(rng, spec)
    w_in = np.concatenate([params["w_in"].reshape(12, -1), params["shared"]["w_in"]])
    b_in = np.concatenate([params["b_in"].reshape(12), params["shared"]["b_in"]])
    w_out = np.concatenate([params["w_out"].reshape(12, -1), params["shared"]["w_out"]])
    assert_all_executions(params, x, spec, mlp(x, w_in, b_in, w_out) + params["b_out"])


def ultra_fast_bert(x, w_in, b_in, w_out, parallel_size, depth):
    """The layer of UltraFastBERT (arXiv 2311.10770) from its definition, with its own node numbering.

    One linear map to all nodes of all trees; the decision is logit > 0; a mask keeps the depth + 1 nodes of
    each tree's path (the bottom level contributes too); y = linear_out(GELU(logits) * mask), without bias.
    """
    n_nodes = 2 ** (depth + 1) - 1
    logits = (x @ w_in.T + b_in).reshape(len(x), parallel_size, n_nodes)
    mask = np.zeros_like(logits)
    current = np.zeros((len(x), parallel_size), int)
    for d in range(depth + 1):
        here = np.take_along_axis(logits, current[..., None], -1)[..., 0]
        np.put_along_axis(mask, current[..., None], 1.0, -1)
        platform, next_platform = 2**d - 1, 2 ** (d + 1) - 1
        current = (current - platform) * 2 + (here > 0).astype(int) + next_platform
    return (gelu(logits) * mask).reshape(len(x), -1) @ w_out


@pytest.mark.parametrize("parallel_size, depth", [(1, 4), (3, 2)])
def test_ultra_fast_bert(parallel_size, depth):
    """W = 1, hard, exact GELU, no b_out; weights fixed, not drawn."""
    E, n_nodes = 5, 2 ** (depth + 1) - 1
    count = parallel_size * n_nodes
    w_in = np.sin(1.0 + 7.3 * np.arange(count * E)).reshape(count, E)
    b_in = 0.3 * np.cos(2.9 * np.arange(count))
    w_out = np.cos(0.5 + 3.1 * np.arange(count * E)).reshape(count, E)
    x = 2 * np.sin(5.7 * np.arange(40 * E)).reshape(40, E)
    params = {
        "w_in": w_in.reshape(parallel_size, n_nodes, E),
        "b_in": b_in.reshape(parallel_size, n_nodes),
        "w_out": w_out.reshape(parallel_size, n_nodes, E),
        "b_out": np.zeros(E),
        "threshold": np.zeros((parallel_size, n_nodes)),
    }
    params, x = jax.tree.map(np.float32, (params, x))
    spec = cases.make_spec("hard", P=parallel_size, D=depth, W=1, activation="gelu")
    assert_all_executions(params, x, spec, ultra_fast_bert(x, w_in, b_in, w_out, parallel_size, depth))


def test_thin_routers_above_wide_leaves_are_a_mixture_of_experts(rng):
    """Routers with w_out = 0 only decide: y is the chosen expert's output, no more."""
    routers, n_experts, width = 3, 4, 6
    spec = cases.make_spec("hard", P=1, D=2, W=(1, 1, width), activation="tanh")
    params, x, _ = cases.grid_case(rng, spec)
    params["w_out"][0, :routers] = 0
    experts = [
        {k: params[k][0, routers:].reshape(n_experts, width, -1)[e] for k in ("w_in", "b_in", "w_out")}
        for e in range(n_experts)
    ]
    r = x @ params["w_in"][0, :routers].T + params["b_in"][0, :routers] - params["threshold"][0, :routers]
    expert = np.where(r[:, 0] > 0, 2 + (r[:, 2] > 0), r[:, 1] > 0).astype(int)
    assert len(set(expert)) == n_experts
    want = [
        mlp(x_E, experts[e]["w_in"], experts[e]["b_in"][:, 0], experts[e]["w_out"])
        for x_E, e in zip(x, expert)
    ]
    assert_all_executions(params, x, spec, np.stack(want) + params["b_out"])


@pytest.mark.parametrize("routing", ["hard", "continuous_product"])
def test_infinite_thresholds_are_a_static_dense_layer(routing, rng):
    """Each tree is one path, the same for every token: A units in all. Continuous gates are 1 there."""
    spec = cases.make_spec(routing, P=2, D=2, W=2, S=1, activation="tanh")
    params, x, _ = cases.grid_case(rng, spec)
    inf = np.float32(np.inf)
    params["threshold"] = np.array([[-inf, inf, inf, 0, 0, 0, 0], [inf, -inf, inf, 0, 0, 0, 0]], np.float32)
    nodes = ((0, 2, 5), (0, 1, 4))  # right then left; left then right
    units = [(p, 2 * n + u) for p in range(2) for n in nodes[p] for u in range(2)]
    pick = lambda name: np.stack([params[name][unit] for unit in units])
    stack = {k: np.concatenate([pick(k), params["shared"][k]]) for k in ("w_in", "b_in", "w_out")}
    assert len(stack["b_in"]) == spec.shape.active_units
    assert_all_executions(
        params, x, spec, mlp(x, stack["w_in"], stack["b_in"], stack["w_out"]) + params["b_out"]
    )
