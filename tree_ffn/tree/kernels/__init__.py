"""Rows read where they lie, in C++ for CPUs: what the gather execution uses there once it is built.

    make kernels                     # or: python -m tree_ffn.tree.kernels

A path reads a few rows of weights for every token and tree. XLA copies them into a new array before it
multiplies, number by number; `rows.cc` multiplies them in place, on XLA's own threads. Nothing else depends
on it: without it, on other platforms and in other dtypes than float32 the gather execution is XLA's.

The library lies beside this file, or in the directory that TREE_FFN_KERNELS names, and is called after what
it was made from (the source, the version of jax, the processor): where one of these is another, it counts as
not built.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.paths import local

SOURCE = pathlib.Path(__file__).parent / "rows.cc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
TARGETS = {"dots": "TreeFfnDots", "sums": "TreeFfnSums"}


def shared_object() -> pathlib.Path:
    """Where the library of this source, jax and processor is, built or not."""
    made_from = [SOURCE.read_text(encoding="utf-8"), jax.__version__, processor(), *FLAGS]
    name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    named = local(os.environ.get("TREE_FFN_KERNELS", ""), "TREE_FFN_KERNELS")
    return pathlib.Path(named or SOURCE.parent) / f"rows-{name}.so"


def processor() -> str:
    """What the processor can do, as far as the system says; the library uses all of it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {platform.processor()} {flags}"


def build(compiler: str | None = None) -> pathlib.Path:
    """Compiles the library, unless it is there, and returns its path.

    Args:
      compiler: of C++17 with GCC's flags; by default $CXX, or the first of g++ and clang++ that is there.

    Raises:
      InputError: there is no compiler, it fails, or the directory cannot be written.
    """
    to = shared_object()
    if to.exists():
        return to
    compiler = compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise InputError(
            "kernels: no C++ compiler was found; install g++ (on Debian or Ubuntu the package g++), or name "
            "one by CXX=."
        )
    try:
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            made = os.path.join(folder, to.name)
            _compile(shlex.split(compiler), made)
            os.replace(made, to)  # whole or not at all, whoever else builds it
    except OSError as error:
        raise InputError(
            f"kernels: {to.parent} cannot be written ({error.strerror}); name another directory by "
            "TREE_FFN_KERNELS, here and where the layer is used."
        ) from error
    return to


def _compile(compiler: list[str], made: str) -> None:
    command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", made]
    named = "name a C++ compiler by CXX="
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"kernels: {compiler[0]} cannot be run ({error.strerror}); {named}.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = next((line for line in lines if "error" in line), "".join(lines[:1]))
        raise InputError(f"kernels: {compiler[0]} failed ({said}); {named}.")


@functools.cache
def is_loaded() -> bool:
    """Whether the library is there and its functions are known to XLA; the first call loads it.

    Raises:
      InputError: it is there and cannot be loaded.
    """
    if not shared_object().exists():
        return False
    load_once()
    return True


@functools.cache
def load_once() -> None:
    """Makes the functions known to XLA, once in a process."""
    try:
        functions = ctypes.cdll.LoadLibrary(str(shared_object()))
    except OSError as error:
        raise InputError(
            f"kernels: {shared_object()} cannot be loaded ({error}); remove it, or build it again."
        ) from error
    for name, symbol in TARGETS.items():
        function = jax.ffi.pycapsule(getattr(functions, symbol))
        jax.ffi.register_ffi_target(f"tree_ffn_{name}", function, platform="cpu")


def dots(x_TE: jax.Array, rows_PUE: jax.Array, start_TP: jax.Array, width: int) -> jax.Array:
    """Each token's dot products with a run of rows of every tree, float32; on CPUs, once `is_loaded`.

        z[t, p, w] = <x[t], rows[p, start[t, p] + w]>,    w < width

    Args:
      x_TE, rows_PUE: float32; one array [1, U, E] may be that of all trees.
      start_TP: int32, in range.
      width: rows of a run.
    """
    shape = jax.ShapeDtypeStruct((*start_TP.shape, width), jnp.float32)
    return jax.ffi.ffi_call("tree_ffn_dots", shape, vmap_method="sequential")(x_TE, rows_PUE, start_TP)


def sums(h_TPW: jax.Array, rows_PUE: jax.Array, start_TP: jax.Array) -> jax.Array:
    """Each token's sum of the rows of a run of every tree, weighed: float32 [T, E]; as `dots`.

        s[t] = sum_p sum_w h[t, p, w] rows[p, start[t, p] + w]

    Args:
      h_TPW, rows_PUE: float32.
      start_TP: int32, in range.
    """
    shape = jax.ShapeDtypeStruct((h_TPW.shape[0], rows_PUE.shape[2]), jnp.float32)
    return jax.ffi.ffi_call("tree_ffn_sums", shape, vmap_method="sequential")(h_TPW, rows_PUE, start_TP)
