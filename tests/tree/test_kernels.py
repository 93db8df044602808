"""The C++ part: it computes what numpy computes, in one order, and gather uses it where it is built."""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import TreeShape, TreeSpec, gather, init_params, kernels, pick_implementation, tree_ffn

RECIPE = {
    "routing": "continuous", "openness": "logistic", "gate": "product", "router": "silent",
    "renormalise": True, "gate_norm": 2, "beam": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The directory that the library was built into."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler (Debian package g++)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREE_FFN_KERNELS", str(tmp_path_factory.mktemp("kernels")))
        return kernels.build().parent


@pytest.fixture
def built(library, monkeypatch):
    """Programs that are compiled now read rows where they lie; those before and after do not."""
    yield from looked_for_in(library, monkeypatch)


@pytest.fixture
def not_built(tmp_path, monkeypatch):
    """The directory where it is looked for, an empty one."""
    yield from looked_for_in(tmp_path, monkeypatch)


def looked_for_in(directory, monkeypatch):
    monkeypatch.setenv("TREE_FFN_KERNELS", str(directory))
    forget()
    yield directory
    monkeypatch.undo()
    forget()


def forget():
    kernels.is_loaded.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("T, P, W, E", [(1, 1, 1, 8), (3, 4, 2, 100), (1, 5, 1, 768), (40, 3, 3, 300)])
@pytest.mark.parametrize("forest", [False, True], ids=["trees", "forest"])
def test_rows_are_read_where_they_lie(T, P, W, E, forest, built, rng):
    """Products and sums are those of float64; a pruned layer's trees are one array of rows."""
    U = 9
    rows = rng.normal(size=(1 if forest else P, U, E)).astype(np.float32)
    start = rng.integers(0, U - W + 1, (T, P)).astype(np.int32)
    x, h = rng.normal(size=(T, E)).astype(np.float32), rng.normal(size=(T, P, W)).astype(np.float32)
    tree = np.zeros(P, int) if forest else np.arange(P)
    run = rows.astype(np.float64)[tree[None, :, None], start[..., None] + np.arange(W)]
    assert kernels.is_loaded()
    z = jax.jit(kernels.dots, static_argnums=3)(x, rows, start, W)
    s = jax.jit(kernels.sums)(h, rows, start)
    assert z.shape == (T, P, W) and s.shape == (T, E)
    np.testing.assert_allclose(z, np.einsum("te,tpwe->tpw", x, run), rtol=1e-5, atol=1e-5 * E**0.5)
    np.testing.assert_allclose(s, np.einsum("tpw,tpwe->te", h, run), rtol=1e-5, atol=1e-5 * (P * W) ** 0.5)


def test_a_token_is_computed_alike_in_any_company(built, rng):
    """No order of a sum depends on the number of tokens, nor on which thread comes first."""
    rows = jnp.asarray(rng.normal(size=(16, 40, 500)), jnp.float32)
    start = jnp.asarray(rng.integers(0, 38, (200, 16)), jnp.int32)
    x = jnp.asarray(rng.normal(size=(200, 500)), jnp.float32)
    h = jnp.asarray(rng.normal(size=(200, 16, 2)), jnp.float32)
    z, s = kernels.dots(x, rows, start, 2), kernels.sums(h, rows, start)
    for t in (0, 57, 199):
        np.testing.assert_array_equal(kernels.dots(x[t : t + 1], rows, start[t : t + 1], 2)[0], z[t])
        np.testing.assert_array_equal(kernels.sums(h[t : t + 1], rows, start[t : t + 1])[0], s[t])
    for _ in range(5):
        np.testing.assert_array_equal(kernels.dots(x, rows, start, 2), z)
        np.testing.assert_array_equal(kernels.sums(h, rows, start), s)


@pytest.mark.parametrize("T", [1, 50])
@pytest.mark.parametrize(
    "fields, shape",
    [({"routing": "hard"}, TreeShape(2, 4, 3, 1)), (RECIPE, TreeShape(8, 5, 1))],
    ids=["hard", "recipe"],
)
def test_gather_is_the_same_layer(fields, shape, T, built, rng):
    spec = TreeSpec(shape, **fields)
    params = init_params(jax.random.key(0), spec, 64)
    x = jnp.asarray(rng.normal(size=(T, 64)), jnp.float32)

    def loss(params, x, execution):
        y, info = tree_ffn(params, x, spec, execution)
        return (y**2).sum(), (y, info.leaf_TP)

    run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=2)
    text = run.lower(params, x, "gather").as_text()
    assert "tree_ffn_dots" in text and "tree_ffn_sums" in text
    ((_, (y, leaf)), dx), ((_, (want, leaf_want)), dx_want) = (
        run(params, x, e) for e in ("gather", "masked")
    )
    np.testing.assert_array_equal(leaf, leaf_want)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(dx, dx_want, atol=1e-4)


def test_a_machine_without_it_has_xla(not_built):
    assert not kernels.is_loaded()
    x = jnp.ones((2, 8), jnp.float32)
    spec = cases.make_spec(P=2, D=2)
    text = jax.jit(tree_ffn, static_argnums=(2, 3)).lower(
        init_params(jax.random.key(0), spec, 8), x, spec, "gather"
    )
    assert "tree_ffn_dots" not in text.as_text()


def test_bfloat16_is_left_to_xla(built):
    assert gather.in_place(jnp.float32, jnp.float32)
    assert not gather.in_place(jnp.bfloat16, jnp.float32)


def test_more_tokens_are_for_gather():
    spec = cases.make_spec(P=2, D=2)
    chosen = [pick_implementation(spec, T, "cpu", in_place=True) for T in (17, 256, 257)]
    assert chosen == ["gather", "gather", "masked"]
    assert pick_implementation(spec, 17, "cpu") == "masked"


def test_a_compiler_that_fails_or_is_not_there_is_named(not_built, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(InputError, match=r"/bin/false failed .*CXX="):
        kernels.build()
    with pytest.raises(InputError, match="cannot be run"):
        kernels.build("/no/such/compiler")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="install g"):
        kernels.build()
    assert not list(pathlib.Path(not_built).iterdir())


def test_a_directory_that_is_not_there_is_named(not_built, monkeypatch):
    monkeypatch.setenv("TREE_FFN_KERNELS", str(not_built / "none"))
    with pytest.raises(InputError, match="none cannot be written .*TREE_FFN_KERNELS"):
        kernels.build("g++")


def test_a_library_that_cannot_be_loaded_is_named(not_built):
    kernels.shared_object().write_text("no library")
    kernels.load_once.cache_clear()
    with pytest.raises(InputError, match="remove it, or build it again"):
        kernels.is_loaded()
