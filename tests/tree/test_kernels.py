"""The C++ part: it computes what numpy computes, in one order, and gather uses it where it is built."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import TreeShape, TreeSpec, gather, init_params, kernels, pick_implementation, tree_ffn
from tree_ffn.tree.kernels import compilers, probe_elsewhere

RECIPE = {
    "routing": "continuous", "openness": "logistic", "gate": "product", "router": "silent",
    "renormalise": True, "gate_norm": 2, "beam": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The directory that the library was built into."""
    if not compilers.found():
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
    assert [line.partition(" did not: ")[0].rpartition("g++")[2] for line in only_cxx.said] == [
        " -march=native", " -mcpu=native", "",
    ]  # fmt: skip
    assert [path.name for path in not_built.iterdir()] == ["cxx"]


def test_a_tuning_that_a_compiler_has_not_or_that_this_processor_has_not(only_cxx, library, monkeypatch):
    """The first is refused, the second makes what ends by a signal here: the library is that without."""
    (whole,) = library.glob("rows-*")
    monkeypatch.setattr(
        kernels, "probe_elsewhere", lambda made: "SIGILL" if "1.so" in made else probe_elsewhere(made)
    )
    copy = f'for a; do to="$a"; [ "$a" = -march=native ] && exit 1; done; cp {whole} "$to"'
    assert only_cxx(copy).exists() and "-mcpu=native did not: SIGILL" in only_cxx.said[1]
    assert only_cxx.said[2].endswith("--driver-mode=g++ made it.")


def test_what_ends_by_a_signal_is_not_kept(tmp_path):
    """As by an instruction that the processor lacks; here, a library that kills whoever loads it."""
    compiler = next(iter(compilers.found()), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler (Debian package g++)")
    source, made = tmp_path / "ill.cc", str(tmp_path / "ill.so")
    source.write_text("#include <csignal>\nstruct Ill { Ill() { raise(SIGILL); } } ill;")
    assert compilers.compile_library(compiler, "", source, ".", made) is None
    assert kernels.probe_elsewhere(made) == "what it made ends by SIGILL"


def test_compilers_are_tried_once_each_and_named_ones_first(tmp_path, monkeypatch):
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


def test_another_processor_or_jax_has_another_library(monkeypatch):
    here = kernels.shared_object()
    monkeypatch.setattr(kernels, "processor", lambda: "x86_64 flags : fpu")
    other = kernels.shared_object()
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert len({here, other, kernels.shared_object()}) == 3


def test_a_library_that_cannot_be_loaded_is_named_and_built_again(not_built, monkeypatch):
    kernels.shared_object().write_text("no library")
    kernels.load_once.cache_clear()
    with pytest.raises(InputError, match="remove it, or build it again"):
        kernels.is_loaded()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "exit-3")
    with pytest.raises(InputError, match="exit-3 failed"):  # it is tried, and not taken as it is
        kernels.build()
