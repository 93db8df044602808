"""One precision for every kind of layer: what is float32 under bfloat16 tokens, and where it is rounded.

The definition in float64 rounds where docs/layer.md says so. Inputs cancel in every pre-activation, so one
that is rounded to bfloat16 before its bias is added would be off by as much as it is worth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.models.dense import DenseSpec, dense_ffn
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec, leaf_ffn, tree_ffn

E, T, X, W = 8, 16, 4, 6


def rounded(a):
    return np.asarray(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16), np.float64)


def bfloat16_numbers(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)


def cancelling(rng, *units):
    """Weights and tokens, exact in bfloat16: <w, x> is about 8, and b_in takes nearly all of it away."""
    x = rounded(1 + 0.05 * rng.normal(size=(T, E)))
    w_in = rounded(1 + 0.3 * rng.normal(size=(*units, E)))
    b_in = rounded(0.3 * rng.normal(size=units) - w_in.sum(axis=-1))
    w_out = rounded(rng.normal(size=(*units, E)))
    return {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": np.zeros(E)}, x


def check(y_TE, p, x, gate_TU, gated_last=False):
    """Within one rounding of the sum of rounded g act(z), act relu, over units [U]; U gates a token.

    `grouped` gates last: the sum of g times rounded act(z).
    """
    w_in, w_out = p["w_in"].reshape(-1, E), p["w_out"].reshape(-1, E)
    units = np.maximum(x @ w_in.T + p["b_in"].reshape(-1), 0)
    h = gate_TU * rounded(units) if gated_last else rounded(gate_TU * units)
    wanted = h @ w_out
    # A hidden value within float32's error of the middle of two numbers may become the other one.
    slack = 2.0**-13 * (np.abs(h) @ np.abs(w_out))
    assert y_TE.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y_TE, np.float64) - wanted)
    assert (error <= cases.BFLOAT16 * np.abs(wanted) + slack).all(), (
        error - cases.BFLOAT16 * np.abs(wanted)
    ).max()


def test_dense(rng):
    p, x = cancelling(rng, X * W)
    y, _ = cases.jit(lambda p, x: dense_ffn(p, x, DenseSpec(X * W, "relu")))(*bfloat16_numbers((p, x)))
    check(y, p, x, np.ones((T, X * W)))


def softmax_gates(p, x, k):
    """Logits that differ by less than bfloat16 sees of them; l2 norm of the k best."""
    logits = x @ p["w_router"].T
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob = np.where(prob >= np.sort(prob, axis=1)[:, [-k]], prob, 0.0)
    return np.repeat(prob / np.linalg.norm(prob, axis=1, keepdims=True), W, axis=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts(implementation, rng):
    p, x = cancelling(rng, X, W)
    p["w_router"] = rounded(16 + 0.4 * rng.normal(size=(X, E)))  # logits of 128: bfloat16 knows whole ones
    spec = LeafSpec(n_experts=X, expert_width=W, top_k=2, router="softmax", activation="relu")
    y = cases.jit(lambda p, x: leaf_ffn(p, x, spec, implementation)[0])(*bfloat16_numbers((p, x)))
    check(y, p, x, softmax_gates(p, x, 2), gated_last=implementation == "grouped")


def test_decisions_of_a_tree_of_experts(rng):
    """Logits 257 - 256 and 256 - 256: in bfloat16 both are 0."""
    x = jnp.asarray([[16, 1], [16, 0]], jnp.bfloat16)
    p = bfloat16_numbers({
        "w_router": np.array([[16, 1]]), "b_router": np.array([-256]), "w_in": np.zeros((2, 1, 2)),
        "b_in": np.ones((2, 1)), "w_out": np.ones((2, 1, 2)), "b_out": np.zeros(2),
    })  # fmt: skip
    spec = LeafSpec(n_experts=2, expert_width=1, top_k=1, gate_norm="none", activation="relu")
    y, info = cases.jit(lambda p, x: leaf_ffn(p, x, spec))(p, x)
    assert info.leaf_TP.tolist() == [[1], [0]]
    wanted = rounded([1 / (1 + np.exp(-1.0)), 0.5])
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.stack([wanted, wanted], axis=1))


@pytest.mark.parametrize("router, width", [("first_unit", 1), ("first_unit", 2), ("frozen", 1)])
def test_decisions_of_paths(router, width):
    """Products 257 and 256.25, sums with a bias of 256, and a threshold between them: bfloat16 knows none."""
    x = jnp.asarray([[16, 2], [16, 0.5]], jnp.bfloat16)
    spec = TreeSpec(TreeShape(1, 1, width), router=router, activation="relu")
    row, bias = np.array([16, 0.5]), 256 if router == "first_unit" else 0
    p = bfloat16_numbers({
        "w_in": np.tile(row, (1, 3 * width, 1)), "b_in": np.full((1, 3 * width), bias),
        "w_out": np.ones((1, 3 * width, 2)), "b_out": np.zeros(2), "router": {"w": row.reshape(1, 1, 2)},
    }) | {"threshold": jnp.full((1, 3), 256.5 + bias)}  # fmt: skip
    decide = cases.jit(lambda p, x, how: tree_ffn(p, x, spec, how)[1].leaf_TP, static_argnums=2)
    for how in ("masked", "gather"):
        assert decide(p, x, how).tolist() == [[1], [0]]  # one product with all rows
    assert [decide(p, token[None], "gather").item() for token in x] == [1, 0]  # rows of the path alone


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("widths", [2, pytest.param((1, 2, 1, 3), id="per_level")])
def test_paths_sum_in_float32_and_round_once(widths, implementation, rng):
    """Every product and sum is exact in float32, and decisions have thresholds that bfloat16 would lose."""
    P, D = 5, 3
    spec = TreeSpec(TreeShape(P, D, widths), activation="relu")
    U = spec.shape.tree_units
    p = {"w_in": cases.on_grid(rng, P, U, E), "b_in": cases.on_grid(rng, P, U)}
    p |= {"w_out": 3 * cases.on_grid(rng, P, U, E), "b_out": np.zeros(E, np.float32)}
    x = cases.on_grid(rng, T, E)
    threshold = cases.on_grid(rng, P, spec.shape.n_nodes) + np.float32(2.0**-12)
    low = bfloat16_numbers(p) | {"threshold": jnp.asarray(threshold)}
    layer = cases.jit(lambda p, x: tree_ffn(p, x, spec, implementation))
    y, info = layer(low, jnp.asarray(x, jnp.bfloat16))
    z = np.einsum("te,pue->tpu", x, p["w_in"]) + p["b_in"]
    leaf, wanted = np.zeros((T, P), int), np.zeros((T, E))
    for t, tree in np.ndindex(T, P):
        node = 0
        for _ in range(D + 1):
            rows = oracle.rows_of(spec, node)
            wanted[t] += rounded(np.maximum(z[t, tree, rows], 0)) @ p["w_out"][tree, rows]
            node = 2 * node + 1 + (z[t, tree, rows.start] > threshold[tree, node])
        leaf[t, tree] = (node - 1) // 2 - (2**D - 1)
    np.testing.assert_array_equal(info.leaf_TP, leaf)
    np.testing.assert_array_equal(np.asarray(y, np.float64), rounded(wanted))
