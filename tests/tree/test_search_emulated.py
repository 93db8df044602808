"""The kernels of search.cu, thread by thread on a CPU, against XLA's search and float64's gradients.

What a GPU alone can show, that XLA calls them rightly, `make kernels` tries there (`kernels.search.probe`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tests.tree.emulated import call, compiled
from tree_ffn.tree import LeafSpec
from tree_ffn.tree.leaf import beam

# X, K, P, T: with 1, 2 and 4 candidates a lane, and more leaves than a warp has lanes.
CASES = [
    (512, 16, 1, 5),
    (64, 1, 1, 9),
    (48, 7, 3, 20),
    (64, 24, 2, 9),
    (256, 64, 1, 3),
    (64, 4, 4, 9),
    (2, 1, 1, 9),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return compiled("search", tmp_path_factory.mktemp("search"))


def drawn(rng, n_rows: int, n_tokens: int, values: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits without biases, filled up to whole pieces, and biases."""
    r = rng.normal(size=(n_tokens, -(-n_rows // 8) * 8)).astype(np.float32)
    if values == "random":
        return r, rng.normal(size=n_rows).astype(np.float32)
    open_ones = 0.0 if values == "ties" else np.nan
    return np.zeros_like(r), rng.choice([open_ones, 0.0, np.inf, -np.inf], n_rows).astype(np.float32)


@pytest.mark.parametrize("X, K, P, T", CASES)
@pytest.mark.parametrize(
    "values, balanced",
    [
        *(("random", True), ("random", False), ("ties", False), ("no numbers", False)),
        *(pytest.param(values, True, marks=pytest.mark.slow) for values in ("ties", "no numbers")),
    ],
)
def test_the_search_and_its_gradient(X, K, P, T, values, balanced, emulated, rng):
    """The same leaves in the same order, ties and what is no number too; the sum over each leaf's path."""
    spec = LeafSpec(n_experts=X, expert_width=1, top_k=K, n_trees=P, gate_norm="none")
    R, warps = spec.router_rows, 2
    r, b = drawn(rng, R, T, values)
    bias = rng.normal(size=R).astype(np.float32) * (values == "random") if balanced else None
    ids, log_p = np.full((T, K), -7, np.int32), np.full((T, K), np.nan, np.float32)
    shape = (T, R, r.shape[1], P, spec.depth, K, warps)
    call(emulated.SearchOf, *shape, r, b, bias, ids, log_p)
    params = {"selection_bias": jnp.asarray(bias)} if balanced else {}
    wanted = jax.jit(beam.of_logits, static_argnums=3)(params, r, b, spec)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_allclose(log_p, wanted[1], rtol=1e-5, atol=1e-6)

    d = rng.normal(size=(T, K)).astype(np.float32)
    d[0] = rng.choice([-1.0, 0.0, 1.0], K)  # where two meet, nothing may be left
    dr, db = np.full(r.shape, np.nan, np.float32), np.full((3, R), np.nan, np.float32)
    rounded = np.full(r.shape, np.nan, jnp.bfloat16)
    call(emulated.GradientOf, *shape, len(db), r, b, ids, d, dr, rounded, db)
    logits, want = np.asarray(r[:, :R] + b, np.float64), np.zeros(r.shape)
    for t, k in np.ndindex(T, K):
        for n, right in leaf_oracle.ancestors(spec, int(ids[t, k])):
            p = leaf_oracle.s(logits[t, n]) if logits[t, n] == logits[t, n] else 0.5
            want[t, n] += d[t, k] * (right - p)
    np.testing.assert_allclose(dr, want, atol=1e-5)
    np.testing.assert_array_equal(rounded, dr.astype(jnp.bfloat16))
    np.testing.assert_allclose(db.sum(axis=0), want.sum(axis=0)[:R], atol=1e-4)
