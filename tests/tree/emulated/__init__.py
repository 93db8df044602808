"""Kernels of `tree_ffn.tree.kernels`, thread by thread on a CPU, whose instructions.cuh is ours here."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from tree_ffn.tree.kernels import compilers, cuda


def compiled(name: str, folder: pathlib.Path) -> ctypes.CDLL:
    """The library of NAME.cc, its kernels and these instructions."""
    if not compilers.found():
        pytest.skip("needs a C++ compiler (Debian package g++)")
    ours = pathlib.Path(__file__).parent
    kernels = [path for path in cuda.DIRECTORY.glob("*.cuh") if path.name != "instructions.cuh"]
    for source in (*kernels, ours / "instructions.cuh", ours / f"{name}.cc"):
        shutil.copy(source, folder)
    flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-shared"]
    command = [*compilers.found()[0], *flags, str(folder / f"{name}.cc"), "-o", str(folder / f"{name}.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))


def call(function, *arguments):
    """Calls a C function with numbers and arrays; None is no array."""
    pointer = lambda value: ctypes.c_void_p(value.ctypes.data) if isinstance(value, np.ndarray) else value
    function(*map(pointer, arguments))
