"""The leaf layer by a GPU's kernels for few tokens: what chooses them, and that without them it is XLA's.

With a GPU and `make kernels` the last test compares the kernels with float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests import leaf_oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec, leaf_ffn
from tree_ffn.tree.kernels import cuda, decode
from tree_ffn.tree.leaf import init_params

SPEC = LeafSpec(n_experts=32, expert_width=3, top_k=4, gate_norm="rms", dense_start=0.2)


def layer(spec, E=64, dtype=jnp.bfloat16, T=5):
    params = cases.first_weights(init_params, spec, E, param_dtype=dtype)
    return params, jax.random.normal(jax.random.key(0), (T, E), dtype)


@pytest.fixture
def chosen(monkeypatch):
    """As on a machine with one GPU and its kernels, while programs are still compiled for this one's CPU."""
    monkeypatch.setattr(cuda, "in_use", lambda name: name == "decode")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("implementation", [None, "gather"])
def test_compiled_for_a_gpu_it_is_one_call_and_exported_it_is_not(implementation, chosen):
    """Lowering needs no GPU."""
    run = jax.jit(lambda params, x: leaf_ffn(params, x, SPEC, implementation))
    arrays = layer(SPEC)
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@tree_ffn_decode(") == 1 and "dot_general" not in text
    assert "@tree_ffn_decode(" not in run.lower(*arrays).as_text()
    exported = export.export(run, platforms=("cuda",))(*arrays)
    assert "@tree_ffn_decode(" not in exported.mlir_module()


def test_compiled_for_a_cpu_it_is_xla_s_with_its_gradients(chosen):
    spec = SPEC.after_start
    params, x = layer(spec)
    of = lambda implementation: lambda params, x: leaf_ffn(params, x, spec, implementation)[0]
    for implementation in ("gather", None):
        assert "tree_ffn_decode" in str(jax.make_jaxpr(of(implementation))(params, x))

    @functools.partial(jax.jit, static_argnums=2)
    def both(params, x, implementation):
        y, back = jax.vjp(of(implementation), params, x)
        return y, back(y)

    for one, other in zip(
        jax.tree.leaves(both(params, x, "gather")), jax.tree.leaves(both(params, x, "masked"))
    ):
        one, other = (np.asarray(a.astype(jnp.float32)) for a in (one, other))
        assert np.linalg.norm(one - other) <= 2e-2 * np.linalg.norm(other)


def test_a_dense_start_that_is_not_told_of_is_refused_under_differentiation(chosen):
    params, x = layer(SPEC)
    with pytest.raises(InputError, match="done: is missing in the training"):
        loss = lambda params: leaf_ffn(params, x, SPEC)[0].astype(jnp.float32).sum()
        jax.eval_shape(jax.grad(loss), params)
    y, _ = jax.jit(leaf_ffn, static_argnums=2)(params, x, SPEC)
    assert y.dtype == jnp.bfloat16


def test_others_are_asked_for_by_name(chosen):
    params, x = layer(SPEC)
    for implementation in ("masked", "grouped"):
        text = str(jax.make_jaxpr(lambda x, name=implementation: leaf_ffn(params, x, SPEC, name))(x))
        assert "tree_ffn_decode" not in text
    leaking = str(jax.make_jaxpr(lambda x: leaf_ffn(params, x, SPEC, leak=jnp.float32(0.5)))(x))
    assert "tree_ffn_decode" not in leaking


SIZES = [{"T": 0}, {"T": 17}, {"E": 96}, {"dtype": jnp.float32}]
OPTIONS = [
    {"router": "softmax"}, {"balance_rate": 0.1}, {"n_kept": 20}, {"top_k": 17}, {"n_experts": 2048},
    {"n_experts": 4, "n_trees": 4, "gate_norm": "none", "dense_start": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_kernels_are_not_made_for(size):
    assert not decode.fit(*layer(SPEC, **size), SPEC)


@pytest.mark.parametrize("options", OPTIONS)
def test_layers_that_kernels_are_not_made_for(options):
    assert decode.fit(*layer(SPEC), SPEC)
    spec = dataclasses.replace(SPEC, **options)
    assert not decode.fit(*layer(spec), spec)


def test_paths_and_exported_numbers_of_tokens_are_left_to_xla():
    params, x = layer(SPEC)
    assert not decode.fit(params, x, TreeSpec(TreeShape(2, 2)))
    (n,) = export.symbolic_shape("n")
    assert not decode.fit(params, jax.ShapeDtypeStruct((n, 64), jnp.bfloat16), SPEC)


needs_kernels = pytest.mark.skipif(not cuda.in_use("decode"), reason="needs one NVIDIA GPU and make kernels")


@needs_kernels
@pytest.mark.parametrize("T", [1, 2, 3, 9, 16])
@pytest.mark.parametrize(
    "E, spec",
    [
        (128, LeafSpec(n_experts=512, expert_width=6, top_k=16, gate_norm="rms")),
        (192, LeafSpec(n_experts=48, expert_width=33, top_k=7, n_trees=3, gate_norm="l1", activation="silu")),
    ],
)
def test_kernels_compute_the_layer(T, E, spec):
    """The same in every run."""
    params, x = layer(spec, E, T=T)
    run = jax.jit(lambda params, x: leaf_ffn(params, x, spec, "gather"))
    y, info = run(params, x)
    float64 = lambda array: np.asarray(array.astype(jnp.float32), np.float64)
    want, ids, _ = leaf_oracle.leaf_layer(jax.tree.map(float64, params), float64(x), spec)
    same = (np.sort(info.leaf_TP, axis=1) == ids).all(axis=1)  # all but near ties
    assert same.mean() > 0.9
    assert np.linalg.norm((float64(y) - want)[same]) < 1e-2 * np.linalg.norm(want[same])
    np.testing.assert_array_equal(y, run(params, x)[0])
