"""The kernels of decode.cu, thread by thread on a CPU, against float64: `emulated` has the instructions.

What a GPU alone can show, that XLA calls them rightly, is in test_decode.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tests.tree.emulated import call, compiled
from tree_ffn.tree import ACTIVATIONS, LeafSpec
from tree_ffn.tree.kernels import decode
from tree_ffn.tree.leaf.routers import GATE_NORMS


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return compiled("decode", tmp_path_factory.mktemp("decode"))


def drawn(rng, spec, T, E, bias_dtype):
    """A layer and tokens in bfloat16."""
    rounded = lambda array, dtype=jnp.bfloat16: np.asarray(array, dtype)
    X, W, R = spec.n_experts, spec.expert_width, spec.router_rows
    params = {
        "w_router": rounded(rng.normal(size=(R, E)) / E**0.5),
        "b_router": rounded(rng.normal(size=R) / 5, bias_dtype),
        "w_in": rounded(rng.normal(size=(X, W, E)) / E**0.5),
        "b_in": rounded(rng.normal(size=(X, W)) / 5, bias_dtype),
        "w_out": rounded(rng.normal(size=(X, W, E))),
        "b_out": np.zeros(E),
    }
    return params, rounded(rng.normal(size=(T, E)))


def run(emulated, params, x, spec, blocks=5):
    """The sum, float32 [T, E], and ids; what is not written is NaN or -7."""
    T, E = x.shape
    shapes = decode.results(T, E, spec)
    out = [np.full(one.shape, np.nan if one.dtype == jnp.float32 else -7, one.dtype) for one in shapes]
    y, ids, gates, r, z, lists = out
    sizes = (T, E, spec.n_experts, spec.expert_width, spec.n_trees, spec.depth, spec.top_k)
    split = (r.shape[2], r.shape[0], z.shape[0], y.shape[0], blocks)
    how = (decode.NORMS.index(spec.gate_norm), decode.ACTIVATIONS.index(spec.activation))
    units = (params["w_in"], params["b_in"], params["w_out"])
    halves = params["b_in"].dtype == jnp.bfloat16
    call(
        emulated.DecodeOf, *sizes, *split, *how, x, params["w_router"], params["b_router"], *units,
        int(halves), y, ids, gates, r, z, lists,
    )  # fmt: skip
    return y.sum(axis=0), ids


def spec_of(X, W, K, P=1, norm="rms", activation="gelu"):
    return LeafSpec(n_experts=X, expert_width=W, top_k=K, n_trees=P, gate_norm=norm, activation=activation)


# One token and several; experts of less and of more than a tile; more experts than threads; few for many.
CASES = [
    (1, 64, spec_of(64, 6, 16), 1),
    (1, 64, spec_of(24, 20, 7, P=3, norm="l1"), 1),
    (2, 128, spec_of(32, 20, 7, P=2), 5),
    (5, 192, spec_of(384, 3, 4, P=3, norm="l2"), 9),
    (9, 64, spec_of(16, 33, 2, norm="l1"), 5),
    (16, 64, spec_of(64, 2, 16), 40),
    (16, 64, spec_of(2, 17, 1, norm="none"), 3),
]


@pytest.mark.parametrize("T, E, spec, blocks", CASES)
@pytest.mark.parametrize("bias_dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_kernels_compute_the_layer(T, E, spec, blocks, bias_dtype, emulated, rng):
    params, x = drawn(rng, spec, T, E, bias_dtype)
    y, ids = run(emulated, params, x, spec, blocks)
    want, want_ids, _ = leaf_oracle.leaf_layer(params, np.asarray(x, np.float64), spec)
    np.testing.assert_array_equal(np.sort(ids, axis=1), want_ids)
    assert np.linalg.norm(y - want) < 3e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("activation", decode.ACTIVATIONS)
def test_every_activation(activation, emulated, rng):
    spec = spec_of(8, 16, 4, activation=activation)
    params, x = drawn(rng, spec, 1, 64, jnp.bfloat16)
    params["w_in"] = np.asarray(4 * params["w_in"].astype(np.float32), jnp.bfloat16)
    y, _ = run(emulated, params, x, spec)
    want, _, _ = leaf_oracle.leaf_layer(params, np.asarray(x, np.float64), spec)
    assert np.linalg.norm(y - want) < 3e-3 * np.linalg.norm(want)


def test_the_likeliest_comes_first_and_ties_go_to_the_lower_id(emulated, rng):
    spec = spec_of(8, 1, 4)
    params, x = drawn(rng, spec, 1, 64, jnp.float32)
    params["w_router"] = np.zeros_like(params["w_router"])
    params["b_router"] = np.asarray(
        [2, 1, 0, 0, 0, -1, 0], np.float32
    )  # right of the root; then left, of node 5
    _, ids = run(emulated, params, x, spec)
    assert ids.tolist() == [[4, 6, 7, 5]]


def test_no_number_stays_in_its_token(emulated, rng):
    spec = spec_of(16, 3, 4)
    params, x = drawn(rng, spec, 5, 64, jnp.float32)
    y, ids = run(emulated, params, x, spec)
    x[2, 7] = np.nan
    broken, broken_ids = run(emulated, params, x, spec)
    others = np.arange(5) != 2
    np.testing.assert_allclose(broken[others], y[others], rtol=1e-5, atol=1e-6)  # other groups of experts
    np.testing.assert_array_equal(broken_ids[others], ids[others])
    assert np.isnan(broken[2]).all() and len(set(broken_ids[2])) == 4
    assert ((broken_ids >= 0) & (broken_ids < 16)).all()


def test_names_are_those_of_the_tables():
    assert decode.NORMS == tuple(GATE_NORMS) and decode.ACTIVATIONS == tuple(ACTIVATIONS)
