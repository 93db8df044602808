"""The C++ part: it computes what numpy computes, in one order, and gather uses it where it is built."""

import functools
import platform
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import LeafSpec, kernels, leaf, leaf_ffn, path, rows, tree_ffn
from tree_ffn.tree.kernels import compilers, libraries


@pytest.mark.parametrize(
    "T, K, W, E", [(0, 2, 2, 8), (1, 1, 1, 8), (3, 4, 2, 100), (1, 5, 1, 768), (40, 3, 3, 300)]
)
def test_rows_are_read_where_they_lie(T, K, W, E, built, rng):
    """Products and sums are those of float64."""
    F = 29
    weights, start = rng.normal(size=(F, E)).astype(np.float32), rng.integers(0, F - W + 1, (T, K), np.int32)
    x, h = rng.normal(size=(T, E)).astype(np.float32), rng.normal(size=(T, K, W)).astype(np.float32)
    run = weights.astype(np.float64)[start[..., None] + np.arange(W)]
    assert kernels.is_loaded()
    z = jax.jit(kernels.dots, static_argnums=3)(x, weights, start, W)
    s = jax.jit(kernels.sums)(h, weights, start)
    assert z.shape == (T, K, W) and s.shape == (T, E)
    np.testing.assert_allclose(z, np.einsum("te,tkwe->tkw", x, run), rtol=1e-5, atol=1e-5 * E**0.5)
    np.testing.assert_allclose(s, np.einsum("tkw,tkwe->te", h, run), rtol=1e-5, atol=1e-5 * (K * W) ** 0.5)


def test_a_token_is_computed_alike_in_any_company(built, rng):
    """No order of a sum depends on the number of tokens, nor on which thread comes first."""
    weights = jnp.asarray(rng.normal(size=(640, 500)), jnp.float32)
    start = jnp.asarray(rng.integers(0, 638, (200, 16)), jnp.int32)
    x = jnp.asarray(rng.normal(size=(200, 500)), jnp.float32)
    h = jnp.asarray(rng.normal(size=(200, 16, 2)), jnp.float32)
    z, s = kernels.dots(x, weights, start, 2), kernels.sums(h, weights, start)
    for t in (0, 57, 199):
        np.testing.assert_array_equal(kernels.dots(x[t : t + 1], weights, start[t : t + 1], 2)[0], z[t])
        np.testing.assert_array_equal(kernels.sums(h[t : t + 1], weights, start[t : t + 1])[0], s[t])
    np.testing.assert_array_equal(rows.dots(x, weights, start, 2), z)  # what gather calls, op by op
    np.testing.assert_array_equal(rows.sums(h, weights, start), s)
    for _ in range(5):
        np.testing.assert_array_equal(kernels.dots(x, weights, start, 2), z)
        np.testing.assert_array_equal(kernels.sums(h, weights, start), s)


def test_op_by_op_a_call_is_compiled_once(built, caplog):
    """By its sizes, and what is given by name."""
    arrays = jnp.ones((3, 40)), jnp.ones((30, 40)), jnp.zeros((3, 2), jnp.int32)
    rows.dots(*arrays, 5)
    with jax.log_compiles():
        rows.dots(*arrays, 5)
        assert not [record for record in caplog.records if "compil" in record.message.lower()]
        rows.dots(*arrays, 6)
    assert [record for record in caplog.records if "compil" in record.message.lower()]


LAYERS = {
    "paths": (cases.make_spec(P=2, D=4, W=3), path.init_params, tree_ffn),
    "leaves": (LeafSpec(n_experts=64, expert_width=2, top_k=3), leaf.init_params, leaf_ffn),
}


@functools.cache
def weights(name, width):
    """First weights, once: to take up the library, all that is compiled is forgotten."""
    spec, init, _ = LAYERS[name]
    return cases.first_weights(init, spec, width)


every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("T", [50, *(pytest.param(T, marks=pytest.mark.slow) for T in (0, 1))])
def test_gather_is_the_same_layer(name, T, built, rng):
    spec, _, layer = LAYERS[name]
    params = weights(name, 64)
    x = jnp.asarray(rng.normal(size=(T, 64)), jnp.float32)

    def loss(params, x, implementation):
        y, info = layer(params, x, spec, implementation)
        return (y**2).sum(), (y, info.leaf_TP)

    run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=2)
    (_, (want, leaf_want)), dx_want = run(params, x, "masked")
    (_, (y, chosen)), dx = run(params, x, "gather")
    np.testing.assert_array_equal(chosen, leaf_want)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(dx, dx_want, atol=1e-4)
    forward = jax.jit(lambda params, x: layer(params, x, spec, "gather")[0])
    text = forward.lower(params, x).as_text()
    assert "tree_ffn_dots" in text and "tree_ffn_sums" in text
    np.testing.assert_allclose(forward(params, x), want, atol=1e-5)


@every_layer
def test_a_machine_without_it_has_xla(name, not_built):
    assert not kernels.is_loaded()
    spec, _, layer = LAYERS[name]
    params, x = weights(name, 8), jnp.ones((2, 8), jnp.float32)
    text = jax.jit(layer, static_argnums=(2, 3)).lower(params, x, spec, "gather").as_text()
    assert "custom_call" not in text


@every_layer
@pytest.mark.parametrize("batch", ["3", "b", pytest.param("4*b", marks=pytest.mark.slow)])
def test_an_exported_layer_calls_no_kernel(name, batch, built):
    """Another machine knows none; programs that are compiled here call them, before and after."""
    spec, _, layer = LAYERS[name]
    params, x = weights(name, 8), jax.random.normal(jax.random.key(1), (12, 8))
    x = x[:3] if batch == "3" else x
    forward = jax.jit(lambda params, x: layer(params, x, spec, "gather")[0])
    text = lambda: forward.lower(params, x).as_text()
    assert "@tree_ffn_dots" in text()
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape(batch), 8), jnp.float32)
    exported = export.export(forward)(params, shape)
    assert "@tree_ffn" not in exported.mlir_module()
    assert "@tree_ffn_dots" in text()
    np.testing.assert_allclose(exported.call(params, x), forward(params, x), atol=1e-5)


@every_layer
def test_other_programs_call_kernels_or_do_without(name, built):
    """shard_map with and without checks, explicit meshes, scan, vmap: one function."""
    spec, _, layer = LAYERS[name]
    params, x = weights(name, 8), jax.random.normal(jax.random.key(1), (8, 8))
    gathered = lambda params, x: layer(params, x, spec, "gather")[0]
    wanted, over = jax.jit(layer, static_argnums=(2, 3))(params, x, spec, "masked")[0], P("rows")
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"mesh": mesh, "in_specs": (P(), over), "out_specs": over}
    by_row = lambda x: gathered(params, x[None])[0]
    others = [jax.jit(jax.vmap(by_row))(x)]
    others.append(jax.jit(lambda x: jax.lax.scan(lambda carry, row: (carry, by_row(row)), 0, x)[1])(x))
    for checked in (True, False):
        split = jax.jit(jax.shard_map(gathered, **specs, check_vma=checked))
        assert "@tree_ffn_dots" in split.lower(params, x).as_text()
        others.append(split(params, x))
    explicit = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(explicit):
        others.append(jax.jit(gathered)(*jax.device_put((params, x), P())))
        others.append(jax.jit(gathered)(jax.device_put(params, P()), jax.device_put(x, over)))
    for other in others:
        np.testing.assert_allclose(other, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["paths", pytest.param("leaves", marks=pytest.mark.slow)])
def test_second_derivatives(name, built):
    """Forward over reverse mode is reverse over reverse mode."""
    spec, _, layer = LAYERS[name]
    params, x = weights(name, 8), jax.random.normal(jax.random.key(1), (2, 8))
    square = lambda x: jnp.square(layer(params, x, spec, "gather")[0]).sum()
    both = cases.jit(lambda x: (jax.hessian(square)(x), jax.jacrev(jax.grad(square))(x)))
    np.testing.assert_allclose(*both(x), atol=1e-4)


def test_bfloat16_is_left_to_xla(built):
    assert rows.in_place(jnp.float32, jnp.float32)
    assert not rows.in_place(jnp.bfloat16, jnp.float32)


@pytest.fixture
def only_cxx(not_built, monkeypatch):
    """Sets $CXX, the only compiler that there is, to a script; the lines that building says go to `said`."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said = []

    def build(script):
        path = not_built / "cxx"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", f"{path} --driver-mode=g++")
        return kernels.build(said.append)

    build.said = said
    return build


@pytest.mark.parametrize(
    "script, why",
    [
        ("exit 3", "exit code 3"),
        ("echo 'rows.cc:9: fatal error: no ffi.h' >&2; echo stopped. >&2; exit 1", "fatal error: no ffi.h"),
        ("echo 'internal: \\377 gave up' >&2; exit 1", "internal: . gave up"),
        ("exit 0", "it made no file"),
        ('for a; do to="$a"; done; echo text > "$to"', "what it made is wrong: OSError: "),
    ],
)
def test_a_compiler_that_fails_is_named_with_its_words(only_cxx, not_built, script, why):
    with pytest.raises(InputError, match=rf"kernels: .*cxx --driver-mode=g\+\+ failed \(.*{why}.*\); .*CXX="):
        only_cxx(script)
    assert len(only_cxx.said) == 1
    assert [path.name for path in not_built.iterdir()] == ["cxx"]


def test_what_ends_by_a_signal_is_not_kept(tmp_path):
    """As by an instruction that the processor lacks; here, a library that kills whoever loads it."""
    compiler = next(iter(compilers.found()), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler (Debian package g++)")
    source, made = tmp_path / "ill.cc", str(tmp_path / "ill.so")
    source.write_text("#include <csignal>\nstruct Ill { Ill() { raise(SIGILL); } } ill;")
    assert compilers.compile_library(compiler, source, ".", made) is None
    assert kernels.probe_elsewhere(made) == "what it made ends by SIGILL"


def test_compilers_are_tried_once_each_and_named_ones_first(not_built, tmp_path, monkeypatch):
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "c++").symlink_to("g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache 'my g++'")
    assert compilers.found() == [["ccache", "my g++"], ["c++"], ["clang++"]]
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(InputError, match="CXX: .* is no command"):
        compilers.found()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(InputError, match=r"/no/such/compiler failed \(it cannot be run: No such file"):
        kernels.build(lambda line: None)
    monkeypatch.delenv("CXX")
    with pytest.raises(InputError, match="no C.. compiler was found; install g"):
        kernels.build(lambda line: None)


def test_a_directory_that_is_not_there_is_named(not_built, monkeypatch):
    monkeypatch.setenv("TREE_FFN_KERNELS", str(not_built / "none"))
    with pytest.raises(InputError, match="none cannot be written .*TREE_FFN_KERNELS"):
        kernels.build()


def test_older_headers_serve_and_newer_ones_do_not(not_built, monkeypatch):
    """A wheel has one library for all versions of jax."""
    here, (major, minor) = kernels.shared_object(), libraries.ffi_version()
    for version in ((major, minor + 2), (major + 1, minor)):
        monkeypatch.setattr(libraries, "ffi_version", lambda version=version: version)
        kernels.shared_object().write_text("of newer headers")
    monkeypatch.setattr(libraries, "ffi_version", lambda: (major, minor + 1))
    newer = kernels.shared_object()
    assert not newer.exists() and newer != here
    here.write_text("of older headers")
    assert kernels.shared_object() == here


def test_headers_have_a_version():
    major, minor = libraries.ffi_version()
    assert (major, minor) >= (0, 3)  # of jax 0.10.2


def test_other_sources_flags_or_processors_have_another_library(monkeypatch):
    of = lambda *made_from: libraries.path_of("rows", made_from)
    here = [of("source", "-O3"), of("source", "-O2"), of("other", "-O3")]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert len({*here, of("source", "-O3")}) == 4


def test_a_library_that_cannot_be_loaded_is_named_and_built_again(not_built, monkeypatch):
    """XLA computes all meanwhile."""
    kernels.shared_object().write_text("no library")
    kernels.load_once.cache_clear()
    with pytest.warns(UserWarning, match="kernels: .* cannot be loaded .* XLA computes all; build it here"):
        assert not kernels.is_loaded()
    kernels.load_once.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "exit-3")
    with pytest.raises(InputError, match="exit-3 failed"):  # it is tried, and not taken as it is
        kernels.build()
