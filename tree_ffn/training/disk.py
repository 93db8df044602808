"""What a workdir's disk says: whole checkpoints, why a write failed; and files that are written whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import IO

from tree_ffn.errors import InputError, reason

# What a full or read-only disk says through tensorstore, which raises no OSError.
DISK_ERRORS = ("No space left on device", "File too large", "Read-only file system", "Disk quota exceeded")


def checkpoint_directory(workdir: str) -> str:
    """Where the checkpoints of a run lie."""
    return os.path.abspath(os.path.join(workdir, "checkpoints"))


def steps_on_disk(directory: str) -> list[int]:
    """Steps whose checkpoint is whole, ascending; reads names only, and removes nothing.

    A save gets its plain number by a rename when all of it is there; until then
    its directory is called `7.orbax-checkpoint-tmp`.

    Example:
      >>> steps_on_disk("nowhere")
      []
    """
    try:
        with os.scandir(directory) as entries:
            return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())
    except OSError:
        return []


def copied_whole(step: str, to: str) -> bool:
    """Links or copies a checkpoint without its optimizer; False where it was being removed meanwhile.

    Raises:
      OSError: a file has gone, or there is no room.
    """
    before = _files(step)
    shutil.copytree(step, to, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("optimizer"))
    return bool(before) and _files(step) == before


def _files(directory: str) -> set[str]:
    return {os.path.join(place, name) for place, _, names in os.walk(directory) for name in names}


def _link_or_copy(path: str, to: str) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or another's file
        shutil.copyfile(path, to)


def disk_error(error: BaseException | None) -> str | None:
    """What the operating system said, if `error` comes from a file; looks at causes too."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.strerror or str(error)
        for said in DISK_ERRORS:
            if said in str(error):
                return said
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: str, field: str = "workdir") -> Iterator[None]:
    """Says in one sentence what the operating system says about `path`, which `field` led to.

    Raises:
      InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        said = error.strerror or reason(error)
        raise InputError(f"{field}: {path} cannot be written ({said}).") from error


@contextlib.contextmanager
def replacing(path: str, mode: str = "w", field: str = "workdir") -> Iterator[IO]:
    """A file that takes the place of `path` once all of it is written; after an error `path` is as it was.

    Args:
      path: of the file; it need not be there.
      mode: "w" for text in UTF-8, "wb" for bytes.
      field: what led to the path; an error names it.

    Raises:
      InputError: it cannot be written.

    Example:
      >>> with replacing("runs/tree/config.json") as file:      # doctest: +SKIP
      ...     file.write("{}")
    """
    with writing(path, field):
        with open(path + ".new", mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(path + ".new", path)
