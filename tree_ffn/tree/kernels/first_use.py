"""Kernels that are built when a program first could use them: what `make kernels` does, unasked and once.

Programs call `build` before they compile anything. A library that lies there is used; a build that failed is
told of once, and not tried again until `make kernels` is.
"""

import os
import pathlib
import sys
from collections.abc import Callable

import jax

from tree_ffn.errors import InputError
from tree_ffn.locks import locked
from tree_ffn.tree import kernels
from tree_ffn.tree.kernels import cuda

VARIABLE = "TREE_FFN_BUILD"  # 0: nothing is built unasked


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def build(*platforms: str, say: Callable[[str], object] = _to_stderr) -> None:
    """Builds what the device at hand lacks, a CPU or an NVIDIA GPU; where it cannot, XLA does it all.

    Of a run of several processes none builds: they may share a directory, and CUDA kernels are for one GPU.

    Args:
      *platforms: of `cpu` and `gpu`, where the program would use them.
      say: takes a line when it begins, and one that says why it failed.
    """
    unasked = os.environ.get(VARIABLE) != "0" and jax.process_count() == 1
    if not unasked or jax.default_backend() not in platforms or not (missing := _missing()):
        return
    directory, failed = missing[0].parent, missing[0].with_suffix(".failed")
    try:
        with locked(str(directory / ".building"), waits=bool):
            if failed.exists() or not _missing():  # another process has built them meanwhile
                return
            say(f"compiling kernels for this {jax.default_backend()}, once ...")
            try:
                (kernels.build if jax.default_backend() == "cpu" else cuda.build)(lambda line: None)
            except InputError as error:
                say(str(error))
                failed.write_text(f"{error}\n", encoding="utf-8")
    except OSError:  # the directory is not ours to write: as if there were no compiler
        return


def _missing() -> list[pathlib.Path]:
    """Libraries that programs for the device at hand look for in vain: a CPU, or one of NVIDIA's GPUs."""
    if jax.default_backend() == "cpu":
        wanted = [kernels.shared_object()]
    else:
        wanted = cuda.wanted() if jax.default_backend() == "gpu" and jax.device_count() == 1 else []
    return [library for library in wanted if not library.exists()]
