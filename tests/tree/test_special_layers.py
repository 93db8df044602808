"""Known layers that must fall out of the same code, each written here from its own definition."""

import jax
import numpy as np
import pytest
from scipy.special import erf

from tests.tree import cases
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, leaf_ffn, tree_ffn


def assert_all_implementations(params, x, spec, want, layer=tree_ffn, **more):
    for implementation in IMPLEMENTATIONS:
        run = cases.jit(lambda params, x, i=implementation: layer(params, x, spec, i, **more)[0])
        got = run(*cases.on_device((params, x)))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=implementation)


def gelu(z):
    return 0.5 * z * (1 + erf(z / np.sqrt(2)))


def mlp(x, w_in, b_in, w_out, act=np.tanh):
    return act(x @ w_in.T + b_in) @ w_out


def test_depth_0_is_a_dense_layer(rng):
    spec = cases.make_spec(P=3, D=0, W=4, activation="tanh")
    params, x, _ = cases.grid_case(rng, spec)
    w_in, b_in, w_out = (params[name].reshape(12, -1) for name in ("w_in", "b_in", "w_out"))
    assert_all_implementations(params, x, spec, mlp(x, w_in, b_in[:, 0], w_out) + params["b_out"])


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
    assert_all_implementations(params, x, spec, ultra_fast_bert(x, w_in, b_in, w_out, parallel_size, depth))


def test_infinite_thresholds_are_a_static_dense_layer(rng):
    """Each tree is one path, the same for every token: A units in all."""
    spec = cases.make_spec("hard", P=2, D=2, W=2, activation="tanh")
    params, x, _ = cases.grid_case(rng, spec)
    inf = np.float32(np.inf)
    params["threshold"] = np.array([[-inf, inf, inf, 0, 0, 0, 0], [inf, -inf, inf, 0, 0, 0, 0]], np.float32)
    nodes = ((0, 2, 5), (0, 1, 4))  # right then left; left then right
    units = [(p, 2 * n + u) for p in range(2) for n in nodes[p] for u in range(2)]
    stack = {name: np.stack([params[name][unit] for unit in units]) for name in ("w_in", "b_in", "w_out")}
    assert len(stack["b_in"]) == spec.active_units
    assert_all_implementations(params, x, spec, mlp(x, **stack) + params["b_out"])


def experts(rng, X, W, E=5):
    normal = lambda *shape: rng.normal(size=shape)
    return {
        "w_in": normal(X, W, E) / E**0.5, "b_in": normal(X, W), "w_out": normal(X, W, E), "b_out": normal(E)
    }, rng.normal(size=(30, E))  # fmt: skip


def outputs(params, x):
    """What every expert makes of every token: [X, T, E]."""
    return np.stack([mlp(x, *(params[name][j] for name in ("w_in", "b_in", "w_out"))) for j in range(4)])


def test_softmax_is_a_mixture_of_experts(rng):
    """Shazeer et al. 2017 (arXiv 1701.06538): y = sum over the top 2 of softmax(those logits) expert(x)."""
    params, x = experts(rng, 4, 3)
    params["w_router"] = rng.normal(size=(4, 5))
    logits = x @ params["w_router"].T
    top = np.argsort(-logits, axis=1)[:, :2]
    kept = np.full_like(logits, -np.inf)
    np.put_along_axis(kept, top, np.take_along_axis(logits, top, axis=1), axis=1)
    gates = np.exp(kept - kept.max(axis=1, keepdims=True))
    gates /= gates.sum(axis=1, keepdims=True)
    want = np.einsum("tx,xte->te", gates, outputs(params, x)) + params["b_out"]
    spec = LeafSpec(n_experts=4, expert_width=3, top_k=2, router="softmax", gate_norm="l1", activation="tanh")
    assert_all_implementations(params, x, spec, want, leaf_ffn)


def test_hash_is_one_expert_by_the_id(rng):
    """Roller et al. 2021 (arXiv 2106.04426): y = expert[hash(id)](x); murmur3's finaliser is the hash."""
    params, x = experts(rng, 4, 3)
    params["salt"] = np.int32(11)
    ids = rng.integers(0, 50_000, 30).astype(np.int32)
    h = ids.astype(np.uint32) ^ np.uint32(11)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    expert = (h ^ (h >> 16)) % 4
    assert len(set(expert)) == 4
    want = outputs(params, x)[expert, np.arange(30)] + params["b_out"]
    spec = LeafSpec(n_experts=4, expert_width=3, top_k=1, router="hash", gate_norm="none", activation="tanh")
    assert_all_implementations(params, x, spec, want, leaf_ffn, token_T=ids)


def test_a_tree_of_depth_1_is_a_logistic_mixture_of_two(rng):
    """Jordan and Jacobs 1994: y = s(r) right(x) + s(-r) left(x), and both are used."""
    params, x = experts(rng, 4, 3)
    params = {name: value[:2] if name != "b_out" else value for name, value in params.items()}
    w, b = rng.normal(size=(1, 5)), rng.normal(size=1)
    right = 1 / (1 + np.exp(-(x @ w[0] + b[0])))
    both = [mlp(x, *(params[name][j] for name in ("w_in", "b_in", "w_out"))) for j in range(2)]
    want = (1 - right)[:, None] * both[0] + right[:, None] * both[1] + params["b_out"]
    spec = LeafSpec(n_experts=2, expert_width=3, top_k=2, gate_norm="l1", activation="tanh")
    assert_all_implementations(params | {"w_router": w, "b_router": b}, x, spec, want, leaf_ffn)
