"""The beam: its order, and that rows which are read one level after the other find what all rows find."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tests.tree import cases
from tree_ffn import recipe
from tree_ffn.tree import LeafSpec, chosen, kernels, leaf_ffn, products
from tree_ffn.tree.kernels import search
from tree_ffn.tree.leaf import beam, init_params, prune
from tree_ffn.tree.leaf.order import best, comparable, taken

E, T = 24, 60
few = beam.few  # the rule: where kernels are built for a test, all tokens are few


@pytest.mark.parametrize("values", [1, 2, 5, 1000])
def test_the_best_are_those_of_a_sort_and_of_equals_the_lower_ids(values, rng):
    """Of scores that are all alike, mostly alike, and mostly not."""
    score = rng.integers(0, values, (50, 24)).astype(np.float32)
    ids = np.argsort(rng.random((50, 300)), axis=1)[:, :24].astype(np.int32)
    order = np.lexsort((ids, -score), axis=1)
    for n in (1, 7, 24):
        which = jax.jit(best, static_argnums=2)(score, ids, n)
        for array in (ids, score):
            found = taken(jnp.asarray(array), which)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, np.take_along_axis(array, order[:, :n], axis=1))


def test_what_is_no_number_is_the_lowest_that_is_there():
    score = jnp.asarray([[jnp.nan, -jnp.inf, -3e38, jnp.inf]])
    least = np.finfo(np.float32).min
    assert comparable(score).tolist() == [[least, least, np.float32(-3e38), np.inf]]
    is_there = jnp.asarray([[True, False, True, True]])
    assert comparable(score, is_there).tolist() == [[least, -np.inf, np.float32(-3e38), np.inf]]


def leaves(X, K, P=1, **fields):
    norm = {"gate_norm": "none"} if K == 1 else {}
    return LeafSpec(n_experts=X, expert_width=1, top_k=K, n_trees=P, **norm, **fields)


SPECS = {
    "one": leaves(64, 1),
    "no_power": leaves(64, 5),
    "a_level": leaves(64, 8, balance_rate=0.1),
    "trees": leaves(48, 7, P=3, balance_rate=0.1),
    "a_root_each": leaves(64, 4, P=4),
    "half": leaves(32, 16),
    "more_than_half": leaves(16, 9),
    "pruned": leaves(64, 5, n_kept=23, balance_rate=0.1),
    "pruned_to_k": leaves(48, 7, P=3, n_kept=7),
}


def drawn(rng, spec):
    """Weights and tokens of a layer in float64, which of its experts are left, and the layer's arrays."""
    params, x, _ = cases.leaf_case(rng, dataclasses.replace(spec, n_kept=0), T, E)
    params["w_router"] /= 3
    keep_X = np.isin(np.arange(spec.n_experts), rng.permutation(spec.n_experts)[: spec.kept_experts])
    arrays = params if not spec.n_kept else prune(params, dataclasses.replace(spec, n_kept=0), keep_X)[1]
    return params, x, keep_X, cases.on_device(arrays)


@functools.cache
def compiled(run, spec):
    return jax.jit(functools.partial(run, spec=spec))


def both(arrays, x, spec):
    """Ids and log p of both executions."""
    assert kernels.is_loaded()
    runs = (beam.of_all_rows, beam.of_asked_rows)
    return [compiled(run, spec)(arrays, jnp.asarray(x, jnp.float32)) for run in runs]


@pytest.mark.parametrize("name", SPECS)
def test_both_executions_are_the_definition(name, built, rng):
    """The same experts for each token whose decisions are clear beyond float32's errors, and their log p."""
    spec = SPECS[name]
    params, x, keep_X, arrays = drawn(rng, spec)
    wanted, gaps = [], []
    for r in x @ params["w_router"].T + params["b_router"]:
        gaps.append([1.0])
        moved = r + params.get("selection_bias", 0.0)
        ids = leaf_oracle.search(spec, moved, keep_X, gaps[-1])
        wanted.append((ids, leaf_oracle.log_p(spec, r)[ids]))
    is_clear = np.array([min(gap) for gap in gaps]) > 1e-4
    assert is_clear.sum() > 0.9 * T
    for ids, log_p in both(arrays, x, spec):
        assert ids.dtype == jnp.int32 and log_p.dtype == jnp.float32
        order = np.argsort(ids, axis=1)
        found = [np.take_along_axis(np.asarray(array), order, axis=1)[is_clear] for array in (ids, log_p)]
        np.testing.assert_array_equal(found[0], [ids for (ids, _), clear in zip(wanted, is_clear) if clear])
        cases.assert_near(found[1], np.array([p for _, p in wanted])[is_clear])


@pytest.mark.parametrize("name", SPECS)
def test_both_executions_alike_where_much_is_equal_or_no_number(name, built, rng):
    """Decisions that are sure or open, whose sums are exact: ties everywhere, and the lower ids win."""
    spec = SPECS[name]
    params, _, keep_X, arrays = drawn(rng, spec)
    for open_ones in (0.0, np.nan):
        b = rng.choice([open_ones, open_ones, np.inf, -np.inf], spec.router_rows)
        zeros = {name: jnp.zeros_like(array) for name, array in arrays.items() if name != "kept_row"}
        x = np.zeros((2, E))
        one, other = both(arrays | zeros | {"b_router": jnp.asarray(b, jnp.float32)}, x, spec)
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], rtol=1e-6)
        if open_ones == 0.0:
            assert np.sort(one[0][0]).tolist() == leaf_oracle.search(spec, b, keep_X)


def test_few_tokens_call_the_kernels_and_derivatives_do_not(built, monkeypatch):
    monkeypatch.setattr(beam, "few", few)
    layer = lambda params, x: leaf_ffn(params, x, recipe(x.shape[1]).after_start, "masked")[0]
    grad = jax.grad(lambda params, x: layer(params, x).sum())
    for width, n_tokens, calls in ((768, 16, True), (768, 17, False), (128, 2, True), (128, 3, False)):
        first = functools.partial(init_params, spec=recipe(width), width=width)
        shapes = jax.eval_shape(first, jax.random.key(0))
        x = jax.ShapeDtypeStruct((n_tokens, width), jnp.float32)
        assert ("tree_ffn_dots" in jax.jit(layer).lower(shapes, x).as_text()) == calls
        assert "tree_ffn_dots" not in jax.jit(grad).lower(shapes, x).as_text()
    assert not few(1, 768, leaves(32, 16))  # asks 31 of 31


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_gradients_of_log_p_are_those_of_the_paths(name, platform, rng, monkeypatch):
    """Of every leaf that is found, in float64; also as accelerators do it, without an index."""
    for module in (chosen, products, beam):
        monkeypatch.setattr(module, "platform", lambda: platform)
    spec = SPECS[name]
    params, x, _, arrays = drawn(rng, spec)
    dlog_p = rng.normal(size=(T, spec.top_k))

    @jax.jit
    def run(w, b, x):
        of = lambda w, b, x: beam.of_all_rows(arrays | {"w_router": w, "b_router": b}, x, spec)
        (ids, _), back = jax.vjp(of, w, b, x)
        return ids, back((np.zeros(ids.shape, jax.dtypes.float0), jnp.asarray(dlog_p, jnp.float32)))

    ids, grads = run(arrays["w_router"], arrays["b_router"], jnp.asarray(x, jnp.float32))
    r = x @ params["w_router"].T + params["b_router"]
    dr = np.zeros_like(r)
    for t, k in np.ndindex(*dlog_p.shape):
        for n, right in leaf_oracle.ancestors(spec, int(ids[t, k])):
            dr[t, n] += dlog_p[t, k] * (leaf_oracle.s(-r[t, n]) if right else -leaf_oracle.s(r[t, n]))
    for got, want in zip(grads, (dr.T @ x, dr.sum(axis=0), dr @ params["w_router"])):
        cases.assert_near(got, want)


def test_a_node_that_is_no_number_has_no_part_in_what_others_learn():
    """The gradients of logits on no path that is found are 0, whatever they are."""
    spec = leaves(16, 2)
    b = jnp.zeros(15).at[0].set(jnp.inf).at[3].set(jnp.nan)  # leaves 0 to 3, left of the root
    params = {"w_router": jnp.zeros((15, E)), "b_router": b}

    @jax.jit
    def run(b):
        of = lambda b: beam.of_all_rows(params | {"b_router": b}, jnp.ones((1, E)), spec)
        (ids, log_p), back = jax.vjp(of, b)
        return ids, log_p, *back((np.zeros(ids.shape, jax.dtypes.float0), jnp.ones((1, 2))))

    ids, log_p, grad = run(b)
    assert (ids >= 8).all() and jnp.isfinite(log_p).all()
    assert jnp.isfinite(grad).all() and grad[3] == 0


def test_where_a_gpus_kernels_are_in_use_every_derivative_is_the_same(rng, monkeypatch):
    """In both modes, of first and second order, of a batch: kernels are primitives with their own rules."""
    spec = leaves(48, 7, P=3, balance_rate=0.1)
    _, x, _, arrays = drawn(rng, spec)
    x, dx, dlog_p = (jnp.asarray(array, jnp.float32) for array in (x, np.sin(x), rng.normal(size=(T, 7))))

    def run(arrays, x):
        log_p = lambda x: beam.of_all_rows(arrays, x, spec)[1]
        loss = lambda arrays, x: jnp.vdot(dlog_p, jnp.exp(beam.of_all_rows(arrays, x, spec)[1]))
        grad = jax.grad(lambda w, b, x: loss(arrays | {"w_router": w, "b_router": b}, x), (0, 1, 2))
        inputs = arrays["w_router"], arrays["b_router"], x
        second = jax.jvp(lambda x: grad(*inputs[:2], x), (x,), (dx,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(grad(*inputs[:2], x)[2], dx))(x)
        rows = jax.vmap(jax.grad(lambda row: log_p(row[None]).sum()))(x)
        return jax.jvp(log_p, (x,), (dx,)), grad(*inputs), second, reverse, rows

    wanted = jax.jit(run)(arrays, x)
    monkeypatch.setattr(search, "in_use", lambda n_tokens, spec: True)
    kernels_too = lambda arrays, x: run(arrays, x)
    assert "tree_ffn_search_gradient" in str(jax.make_jaxpr(kernels_too)(arrays, x))
    for got, want in zip(*map(jax.tree.leaves, (jax.jit(kernels_too)(arrays, x), wanted))):
        cases.assert_near(got, want)


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize("name", [name for name in SPECS if "pruned" not in name])
def test_on_a_gpu_the_kernels_find_what_xla_finds(name, rng):
    """Leaves, log p and gradients of the layer's parameters."""
    spec = SPECS[name]
    if not search.in_use(T, spec):
        pytest.skip("needs make kernels, and one GPU")
    _, x, _, arrays = drawn(rng, spec)
    x = jnp.asarray(x, jnp.float32)

    def run(arrays, x):
        of = lambda b, x: beam.of_all_rows(arrays | {"b_router": b}, x, spec)
        (ids, log_p), back = jax.vjp(of, arrays["b_router"], x)
        return ids, log_p, back((np.zeros(ids.shape, jax.dtypes.float0), jnp.ones_like(log_p)))

    found = jax.jit(run)(arrays, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "in_use", lambda n_tokens, spec: False)
        wanted = jax.jit(lambda *args: run(*args))(arrays, x)
    np.testing.assert_array_equal(found[0], wanted[0])
    jax.tree.map(cases.assert_near, found[1:], wanted[1:])
