"""Flags that name files and directories: their values go through `tree_ffn.paths.local` as they are read.

    _WORKDIR = path_flags.define("workdir", None, "Directory of a training run.")

A path flag is never a plain string: test_path_flags.py looks at those of all programs.
"""

import os
from collections.abc import Callable
from typing import Any

from absl import flags

from tree_ffn.data.compressed import SUFFIXES
from tree_ffn.errors import InputError
from tree_ffn.paths import local, local_each, local_or_bucket

flags.disclaim_key_flags()  # they are those of the module that calls `define`


class _Path(flags.ArgumentParser):
    """absl's parser of one flag; `read` is `local` or `local_each`."""

    syntactic_help = ""

    def __init__(self, read: Callable[[str, str], str], name: str):
        self._read, self._name = read, name

    def parse(self, argument: str) -> str:
        return self._read(argument, f"--{self._name}")

    def flag_type(self) -> str:
        return "string"


class _List(flags.ListParser):
    """absl's parser of a list, of paths."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str | list[str]) -> list[str]:
        return [local(path, f"--{self._name}") for path in super().parse(argument)]


def define(name: str, default: str | None, help: str) -> Any:
    """A flag with one path or glob pattern; as flags.DEFINE_string.

    Args:
      name: of the flag.
      default: its value where none is given.
      help: its sentence in --help.
    """
    return flags.DEFINE(_Path(local, name), name, default, help)


def define_place(name: str, default: str | None, help: str) -> Any:
    """A flag with one path that may be in a bucket.

    Args:
      name: of the flag.
      default: its value where none is given.
      help: its sentence in --help.
    """
    return flags.DEFINE(_Path(local_or_bucket, name), name, default, help)


def define_written(name: str, default: str | None, help: str, packs: tuple[str, ...] = ()) -> Any:
    """A flag with the path of a file that is written: packed by the suffixes `packs`, and plain otherwise.

    A name that says another packing is refused: who reads the file goes by it.

    Args:
      name: of the flag.
      default: its value where none is given.
      help: its sentence in --help.
      packs: suffixes by which the file is packed.
    """

    def read(path: str, field: str) -> str:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in SUFFIXES and suffix not in packs:
            also = f", or with {', '.join(packs)}" if packs else ""
            raise InputError(f"{field}: {path!r} would not be packed; use a name without {suffix}{also}.")
        return local(path, field)

    return flags.DEFINE(_Path(read, name), name, default, help)


def define_each(name: str, default: str | None, help: str) -> Any:
    """A flag with paths or glob patterns joined by commas, as one string.

    Args:
      name: of the flag.
      default: its value where none is given.
      help: its sentence in --help.
    """
    return flags.DEFINE(_Path(local_each, name), name, default, help)


def define_list(name: str, default: list[str], help: str) -> Any:
    """A flag with a list of paths or glob patterns; as flags.DEFINE_list.

    Args:
      name: of the flag.
      default: its values where none are given.
      help: its sentence in --help.
    """
    return flags.DEFINE(_List(name), name, default, help)
