"""The CUDA parts: every .cu file here, compiled by nvcc to a library of its own that its .py file calls.

    make kernels                     # where there is an nvcc; for the GPU at hand, else for NVIDIA's Hopper
    python -m tree_ffn.tree.kernels --capability=9.0                                      # for GPUs elsewhere

Programs for NVIDIA GPUs call their functions once `is_loaded`; without, XLA computes the same.
"""

import concurrent.futures
import ctypes
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax

from tree_ffn.errors import InputError
from tree_ffn.tree.kernels import compilers, libraries
from tree_ffn.tree.meshes import platform

FLAGS = ("-std=c++17", "-O3", "-w", "-shared", "-Xcompiler=-fPIC")
NVCC = "/usr/local/cuda/bin/nvcc"  # where it is if no PATH names it
HOPPER = "9.0"
LIKE_HOPPER = ("9.", "10.")  # 227 KiB of shared memory a block; kernels that start while the last one ends
DIRECTORY = pathlib.Path(__file__).parent
# Of every source: what XLA calls its functions, and what they are called there.
TARGETS: dict[str, dict[str, str]] = {
    "experts": {
        "tree_ffn_plan": "TreeFfnPlan",
        "tree_ffn_units": "TreeFfnUnits",
        "tree_ffn_sums": "TreeFfnSums",
        "tree_ffn_grads": "TreeFfnGrads",
    },
    "decode": {"tree_ffn_decode": "TreeFfnDecode"},
    "search": {"tree_ffn_search": "TreeFfnSearch", "tree_ffn_search_gradient": "TreeFfnSearchGradient"},
}
NEED_HOPPER = ("experts", "decode")


def nvcc() -> str | None:
    """The compiler of this machine; None: there is none."""
    return shutil.which("nvcc") or shutil.which(NVCC)


def check_capability(capability: str) -> None:
    """Raises InputError unless it looks like 9.0."""
    if not _is_nvidia(capability):
        raise InputError(
            f"capability: {capability!r} is no compute capability of NVIDIA's; name one such as {HOPPER}."
        )


def build(say: Callable[[str], object] = print, capability: str = "") -> list[pathlib.Path]:
    """Compiles all sources at once, those that are there already left out, and returns the libraries' paths.

    Args:
      say: takes a line on every source that is compiled.
      capability: of the GPUs that they are for, such as 9.0; empty: of the GPU at hand, else of Hopper.

    Raises:
      InputError: there is no nvcc, it fails, what it makes is wrong on this machine's GPU, or the directory
        cannot be written.
    """
    compiler, at_hand = nvcc(), _capability_at_hand()
    capability = capability or at_hand or HOPPER
    if compiler is None:
        raise InputError("kernels: no nvcc was found; without the CUDA parts XLA does it all.")
    names = [name for name in TARGETS if _is_for(name, capability)]
    one = lambda name: _build_one(compiler, name, capability, say)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        built = list(pool.map(one, names))
    if capability == at_hand:
        for name, library in zip(names, built):
            _keep_if_right(name, library)
    return built


def _keep_if_right(name: str, library: pathlib.Path) -> None:
    """Removes a library that computes something else on this GPU: a process of its own finds out."""
    program = f"from tree_ffn.tree.kernels import {name}; {name}.probe()"
    here = pathlib.Path(__file__).parents[3]
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", errors="replace",
        env=os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )  # fmt: skip
    if done.returncode:
        library.unlink()
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"kernels: {name}.cu is wrong on this GPU ({why}); without it XLA does it all.")


def _build_one(compiler: str, name: str, capability: str, say: Callable[[str], object]) -> pathlib.Path:
    to = shared_object(name, capability)
    if to.exists():
        return to
    try:
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            made = os.path.join(folder, to.name)
            include = f"-I{jax.ffi.include_dir()}"
            words = [compiler, *FLAGS, *_for(capability), include, str(_source(name)), "-o", made]
            why = compilers.run(words, made) or _missing(made, name)
            if why is not None:
                raise InputError(f"kernels: nvcc failed on {name}.cu ({why}); without it XLA does it all.")
            os.replace(made, to)  # whole or not at all, whoever else builds it
    except OSError as error:
        raise InputError(
            f"kernels: {to.parent} cannot be written ({error.strerror}); name another directory by "
            "TREE_FFN_KERNELS, here and where the layer is used."
        ) from error
    say(f"nvcc made {name}.cu for NVIDIA GPUs of compute capability {capability}.")
    return to


def _for(capability: str) -> list[str]:
    number = capability.replace(".", "")
    number += "a" if int(number) >= 90 else ""  # with what later chips need not have
    return [f"-gencode=arch=compute_{number},code=sm_{number}"]


def _missing(library: str, name: str) -> str | None:
    """Why a library cannot be used, as far as a machine without a GPU can tell; None if it can."""
    try:
        functions = ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    lacking = [symbol for symbol in TARGETS[name].values() if not hasattr(functions, symbol)]
    return f"it lacks {', '.join(lacking)}" if lacking else None


def _source(name: str) -> pathlib.Path:
    return DIRECTORY / f"{name}.cu"


def shared_object(name: str, capability: str) -> pathlib.Path:
    """Where the library of a source is for GPUs of a compute capability, built or not.

    Args:
      name: of the source, as in TARGETS.
      capability: such as 9.0.
    """
    texts = [path.read_text(encoding="utf-8") for path in (_source(name), *sorted(DIRECTORY.glob("*.cuh")))]
    made_from = (*texts, *FLAGS, *_for(capability))
    return libraries.path_of(f"{name}-{capability}", made_from, DIRECTORY)


def _capability_at_hand() -> str | None:
    """The first GPU's compute capability, as its driver says: JAX would take its memory to tell."""
    words = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, encoding="utf-8").stdout.split()
    except OSError:
        return None
    return next((word for word in said if _is_nvidia(word)), None)


def _is_nvidia(capability: str) -> bool:
    return re.fullmatch(r"\d+\.\d", capability) is not None


def wanted() -> list[pathlib.Path]:
    """The libraries that programs for the GPU at hand look for."""
    capability = device_capability()
    return [shared_object(name, capability) for name in TARGETS if capability and _is_for(name, capability)]


def _is_for(name: str, capability: str) -> bool:
    return name not in NEED_HOPPER or capability.startswith(LIKE_HOPPER)


def in_use(name: str) -> bool:
    """Whether a program that is traced now may call a source's functions: for the one GPU of this machine.

    Of several, XLA splits no kernel over them.

    Args:
      name: of the source, as in TARGETS.
    """
    return platform() == "gpu" and jax.device_count() == 1 and is_loaded(name)


def device_capability() -> str:
    """The compute capability of JAX's first device; empty: it is no GPU of NVIDIA's."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability if _is_nvidia(capability) else ""


@functools.cache
def is_loaded(name: str) -> bool:
    """Whether XLA knows a source's functions, built for the GPU at hand; the first call loads them, or warns.

    Args:
      name: of the source, as in TARGETS.
    """
    capability = device_capability()
    if not capability or not _is_for(name, capability) or not shared_object(name, capability).exists():
        return False
    return libraries.load(shared_object(name, capability), TARGETS[name], "CUDA")
