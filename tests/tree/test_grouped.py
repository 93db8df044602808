"""Sums by a GPU's kernels: what chooses them, and that without them the same program is XLA's.

With a GPU and `make kernels` the last tests compare the kernels with float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests import oracle
from tree_ffn.tree import LeafSpec, combine, grouped
from tree_ffn.tree.kernels import cuda, experts


def spec_of(X, W, K, activation="gelu"):
    """Leaves of a tree, where there can be one: some of them are multiplied together."""
    router = "softmax" if X & (X - 1) else "tree"
    return LeafSpec(
        n_experts=X, expert_width=W, top_k=K, router=router, gate_norm="none", activation=activation
    )


def draw(rng, spec, T, E, ids=None):
    """Units, tokens, ids, gates and an output's gradient that bfloat16 holds as they are."""
    rounded = lambda array: np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)
    X, W, K = spec.n_experts, spec.expert_width, spec.top_k
    params = {
        "w_in": rounded(rng.normal(size=(X, W, E)) / E**0.5),
        "b_in": rounded(rng.normal(size=(X, W)) / 5),
        "w_out": rounded(rng.normal(size=(X, W, E))),
    }
    if ids is None:
        ids = np.argsort(rng.random((T, X)), axis=1)[:, :K]
    gates = rng.uniform(-1, 1.5, ids.shape)
    return params, rounded(rng.normal(size=(T, E))), ids, gates, rounded(rng.normal(size=(T, E)))


@pytest.fixture
def chosen(monkeypatch):
    """As on a machine with one GPU and its kernels, while programs are still compiled for this one's CPU."""
    monkeypatch.setattr(grouped, "by_kernels", lambda *args: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


def run(spec):
    def f(params, x, ids, gates, ds):
        total = lambda params, x, gates: combine(params, x, ids, gates, spec, "grouped")
        s, back = jax.vjp(total, params, x, gates)
        return s, back(ds)

    return jax.jit(f)


def on_device(params, x, ids, gates, ds, dtype=jnp.float32):
    bf16 = lambda array: jnp.asarray(array, jnp.bfloat16)
    params = {name: jnp.asarray(array, dtype) for name, array in params.items()}
    return params, bf16(x), jnp.asarray(ids, jnp.int32), jnp.asarray(gates, jnp.float32), bf16(ds)


def test_compiled_for_a_cpu_it_is_xla_s_with_its_gradients(chosen, rng):
    spec = spec_of(8, 3, 2)
    arrays = on_device(*draw(rng, spec, 40, 64))
    text = run(spec).lower(*arrays).as_text()
    assert "tree_ffn_units" not in text
    got = run(spec)(*arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "by_kernels", lambda *args: False)
        jax.clear_caches()
        want = run(spec)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_compiled_for_a_gpu_it_calls_kernels_and_exported_it_does_not(chosen, rng):
    """Lowering needs no GPU."""
    spec = spec_of(8, 3, 2)
    arrays = on_device(*draw(rng, spec, 40, 64))
    forward = jax.jit(lambda params, x, ids, gates: combine(params, x, ids, gates, spec, "grouped"))
    text = forward.trace(*arrays[:4]).lower(lowering_platforms=("cuda",)).as_text()
    assert [text.count(f"@tree_ffn_{name}(") for name in ("plan", "units", "sums", "grads")] == [1, 1, 1, 0]
    text = run(spec).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert [text.count(f"@tree_ffn_{name}(") for name in ("plan", "units", "sums", "grads")] == [1, 2, 2, 2]
    exported = export.export(run(spec), platforms=("cuda",))(*arrays)
    assert "tree_ffn_units" not in exported.mlir_module()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": jnp.float32}, {"E": 96}, {"W": 129}, {"T": 0}, {"T": 2**23},
    ],
)  # fmt: skip
def test_what_kernels_are_not_made_for(change):
    sizes = {"X": 8, "W": 3, "E": 64, "T": 40, "dtype": jnp.bfloat16} | change
    x = jax.ShapeDtypeStruct((sizes["T"], sizes["E"]), sizes["dtype"])
    assert not experts.fit(x, 16, (sizes["X"], sizes["W"], sizes["E"]))


def test_an_exported_number_of_tokens_is_left_to_xla():
    (n,) = export.symbolic_shape("n")
    assert not experts.fit(jax.ShapeDtypeStruct((n, 64), jnp.bfloat16), 2, (8, 3, 64))
    assert experts.fit(jnp.ones((40, 64), jnp.bfloat16), 2, (8, 3, 64))


needs_kernels = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not cuda.is_loaded("experts"),
    reason="needs an NVIDIA GPU and make kernels",
)
ids_of_all = lambda T, K: np.tile(np.arange(K), (T, 1))


def test_leaves_of_trees_have_siblings():
    siblings = [experts.siblings(spec_of(X, W, 2)) for X, W in [(64, 6), (64, 16), (64, 32), (2, 1), (40, 6)]]
    assert siblings == [4, 2, 1, 2, 1]


@needs_kernels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "T, X, K, W, E, ids",
    [
        (700, 64, 8, 6, 128, None), (3333, 512, 16, 16, 256, None), (900, 40, 40, 48, 64, None),
        (500, 16, 2, 128, 320, None), (1, 8, 2, 3, 64, None), (2000, 32, 4, 32, 192, ids_of_all(2000, 4)),
    ],
)  # fmt: skip
def test_kernels_compute_the_sum(T, X, K, W, E, ids, dtype, rng):
    """With gradients, the same in every run."""
    spec = spec_of(X, W, K)
    params, x, ids, gates, ds = draw(rng, spec, T, E, ids)
    act = oracle.ACTIVATIONS["gelu"]
    units = lambda j: range(j * W, (j + 1) * W)
    flat = {"w_in": params["w_in"].reshape(-1, E), "b_in": params["b_in"].reshape(-1)}
    flat["w_out"] = params["w_out"].reshape(-1, E)
    want, grads = oracle.sum_of_experts(flat, x, ids, gates, units, act, ds)
    arrays = on_device(params, x, ids, gates, ds, dtype)
    s, (d_params, dx, d_gates) = run(spec)(*arrays)
    pairs = [(s, want), (dx, grads["x"]), (d_gates, grads["gates"])]
    pairs += [(d_params[name], grads[name]) for name in flat]
    for got, right in pairs:
        got = np.asarray(got.astype(jnp.float32), np.float64).reshape(right.shape)
        assert np.linalg.norm(got - right) < 1e-2 * np.linalg.norm(right)
    again = run(spec)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, (s, (d_params, dx, d_gates)), again)
