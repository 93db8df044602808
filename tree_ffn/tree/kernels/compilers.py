"""The C++ compilers of this machine, from the likeliest to the last resort: GCC, clang and Apple's clang."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from tree_ffn.errors import InputError

NAMES = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-w")
# A library leaves names to be found where it is loaded; macOS has to be told.
LIBRARY = ("-dynamiclib", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)


def found() -> list[list[str]]:
    """The command of each compiler: $CXX, which may have arguments, then those that are there, each once.

    Raises:
      InputError: $CXX is no command.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise InputError(
            f"CXX: {os.environ['CXX']!r} is no command ({error}); name a C++ compiler."
        ) from None
    paths = {os.path.realpath(path): name for name in reversed(NAMES) if (path := shutil.which(name))}
    there = [[name] for name in NAMES if name in paths.values()]
    return [command for command in (named, *there) if command]


def compile_library(command: list[str], source: pathlib.Path, include: str, to: str) -> str | None:
    """Makes a library of one source.

    Args:
      command: one of `found`.
      source: the file.
      include: directory of its headers.
      to: the library's path.

    Returns:
      why it failed, in the compiler's own words; None where it did not.
    """
    return run([*command, *FLAGS, *LIBRARY, f"-I{include}", str(source), "-o", to], to)


def run(words: list[str], to: str) -> str | None:
    """Calls a compiler.

    Args:
      words: the command.
      to: the file that it makes.

    Returns:
      why it failed, in the compiler's own words; None where it did not.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = [line for line in lines if "error" in line.lower()] or lines[-2:]
        return "; ".join(said[:2]) or f"exit code {done.returncode}"
    return None if os.path.exists(to) else "it made no file"
