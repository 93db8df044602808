"""Libraries of compiled kernels: where they are, and how XLA comes to know their functions."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Mapping

import jax

from tree_ffn.paths import local

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
DIRECTORY = pathlib.Path(__file__).parent


def path_of(stem: str, made_from: Iterable[str], beside: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Where a library is, built or not. Its name says what it was made from, and which XLA's headers were.

    A jaxlib takes what was made by headers as old as its own, or older. With newer ones it would not start.

    Args:
      stem: how its name begins.
      made_from: sources and flags.
      beside: its directory, unless TREE_FFN_KERNELS names another.
    """
    digest = hashlib.sha256("\n".join([platform.machine(), *made_from]).encode()).hexdigest()[:16]
    directory = pathlib.Path(local(os.environ.get("TREE_FFN_KERNELS", ""), "TREE_FFN_KERNELS") or beside)
    major, own = ffi_version()
    fit = [directory / f"{stem}-{digest}-ffi{major}.{minor}{SUFFIX}" for minor in range(own, 0, -1)]
    return next((path for path in fit if path.exists()), fit[0])


@functools.cache
def ffi_version() -> tuple[int, int]:
    """The version of XLA's interface for foreign functions, as jaxlib's headers say."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    named = dict(re.findall(r"define XLA_FFI_API_(M..OR) (\d+)", header.read_text(encoding="utf-8")))
    return int(named["MAJOR"]), int(named["MINOR"])


def load(path: pathlib.Path, targets: Mapping[str, str], platform: str) -> bool:
    """`register`; False and a warning where the system cannot: a wheel may have brought it from elsewhere.

    Args:
      path: of the library.
      targets: see `register`.
      platform: see `register`.
    """
    try:
        register(path, targets, platform)
    except OSError as error:
        warnings.warn(
            f"kernels: {path} cannot be loaded ({error}), so XLA computes all; build it here by "
            "python -m tree_ffn.tree.kernels, or remove it.",
            stacklevel=2,
        )
        return False
    return True


def register(path: pathlib.Path, targets: Mapping[str, str], platform: str) -> None:
    """Makes functions of a library known to XLA.

    Args:
      path: of the library.
      targets: what XLA calls its functions, and what they are called there.
      platform: `cpu` or `CUDA`.

    Raises:
      OSError: the system cannot load it.
    """
    functions = ctypes.cdll.LoadLibrary(str(path))
    for target, symbol in targets.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(functions, symbol)), platform=platform)
