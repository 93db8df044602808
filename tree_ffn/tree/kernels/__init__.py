"""Rows read where they lie, in C++ for CPUs: what `gather` and beams use there once it is built.

    make kernels                     # or: python -m tree_ffn.tree.kernels

Each token reads a few rows of weights of its own: those of its experts, and of the nodes that a beam keeps.
XLA copies them into a new array, number by number, before it multiplies. `rows.cc` multiplies them in place,
on XLA's own threads. Nothing else depends on it: without it, on other platforms, in other dtypes than float32
and in exported programs XLA does it all.

The library lies beside this file, where a wheel of `make wheel` brings it, or in the directory that
TREE_FFN_KERNELS names. It serves every processor of a kind: where it is loaded, it chooses AVX-512, AVX or
neither.
"""

import functools
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree.kernels import compilers, libraries

SOURCE = pathlib.Path(__file__).parent / "rows.cc"
TARGETS = {"tree_ffn_dots": "TreeFfnDots", "tree_ffn_sums": "TreeFfnSums"}


def shared_object() -> pathlib.Path:
    """Where the library of this source is for processors of this kind, built or not."""
    return libraries.path_of("rows", [SOURCE.read_text(encoding="utf-8"), *compilers.FLAGS])


def build(say: Callable[[str], object] = print) -> pathlib.Path:
    """Compiles the library, unless it is there and right, and returns its path.

    Every compiler of `compilers.found` is tried, until one makes a library that computes what it should in a
    process of its own: a wrong instruction ends that process, and not a training.

    Args:
      say: takes a line on every attempt.

    Raises:
      InputError: there is no compiler, all fail, or the directory cannot be written.
    """
    failed = {}
    try:
        while (to := shared_object()).exists():
            if probe_elsewhere(str(to)) is None:
                return to
            to.unlink()  # a disk was full, or it was copied in part
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            for command in compilers.found():
                called, made = shlex.join(command), os.path.join(folder, f"{len(failed)}{libraries.SUFFIX}")
                why = compilers.compile_library(command, SOURCE, jax.ffi.include_dir(), made)
                why = why or probe_elsewhere(made)
                if why is None:
                    os.replace(made, to)  # whole or not at all, whoever else builds it
                    say(f"{called} made it.")
                    return to
                say(f"{called} did not: {why}")
                failed[called] = why
    except OSError as error:
        raise InputError(
            f"kernels: {to.parent} cannot be written ({error.strerror}); name another directory by "
            "TREE_FFN_KERNELS, here and where the layer is used."
        ) from error
    said = "; ".join(f"{name} failed ({why})" for name, why in failed.items())
    raise InputError(
        f"kernels: {said or 'no C++ compiler was found'}; install g++ (on Debian or Ubuntu the package g++), "
        "or name a C++ compiler by CXX=; without these kernels all works, a little slower."
    )


def probe_elsewhere(library: str) -> str | None:
    """Why a library cannot be used, found out by a process of its own; None if it can."""
    program = "import sys; from tree_ffn.tree import kernels; kernels.probe(sys.argv[1])"
    paths = [str(SOURCE.parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", program, library], capture_output=True, encoding="utf-8", errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode < 0:
        return f"what it made ends by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return f"what it made is wrong: {(done.stderr.strip().splitlines() or [''])[-1]}"
    return None


def probe(library: str) -> None:
    """Raises unless a library's functions compute small whole numbers without an error."""
    libraries.register(pathlib.Path(library), TARGETS, "cpu")
    x_TE, h_TKW = jnp.arange(140.0).reshape(2, 70) % 7, jnp.ones((2, 1, 2))
    rows_FE, start_TK = jnp.arange(210.0).reshape(3, 70) % 5, jnp.array([[0], [1]], jnp.int32)
    run_TWE = jnp.stack([rows_FE[:2], rows_FE[1:]])
    right = (dots(x_TE, rows_FE, start_TK, 2)[:, 0] == (run_TWE * x_TE[:, None]).sum(-1)).all()
    right &= (sums(h_TKW, rows_FE, start_TK) == run_TWE.sum(1)).all()
    if not right:
        raise ArithmeticError("its sums are not those of XLA")


@functools.cache
def is_loaded() -> bool:
    """Whether the library is there and its functions are known to XLA; the first call loads it, or warns."""
    return shared_object().exists() and load_once()


@functools.cache
def load_once() -> bool:
    """Makes the functions known to XLA, once in a process; False: they cannot be."""
    return libraries.load(shared_object(), TARGETS, "cpu")


def dots(x_TE: jax.Array, rows_FE: jax.Array, start_TK: jax.Array, width: int) -> jax.Array:
    """Each token's dot products with runs of rows, float32 [T, K, width]; on CPUs, once `is_loaded`.

        z[t, k, w] = <x[t], rows[start[t, k] + w]>,    w < width

    Args:
      x_TE: float32.
      rows_FE: float32.
      start_TK: int32, in range.
      width: rows of a run.
    """
    shape = jax.ShapeDtypeStruct((*start_TK.shape, width), jnp.float32)
    return jax.ffi.ffi_call("tree_ffn_dots", shape)(x_TE, rows_FE, start_TK)


def sums(h_TKW: jax.Array, rows_FE: jax.Array, start_TK: jax.Array) -> jax.Array:
    """Each token's sum of runs of rows, weighed: float32 [T, E]; as `dots`.

        s[t] = sum_k sum_w h[t, k, w] rows[start[t, k] + w]

    Args:
      h_TKW: float32.
      rows_FE: float32.
      start_TK: int32, in range.
    """
    shape = jax.ShapeDtypeStruct((h_TKW.shape[0], rows_FE.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("tree_ffn_sums", shape)(h_TKW, rows_FE, start_TK)
