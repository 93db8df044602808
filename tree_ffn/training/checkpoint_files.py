"""Where the checkpoints of a run lie, which of them are whole, and what a disk says that takes none."""

import os

from tree_ffn.training import bucket

# What a full or read-only disk says through tensorstore, which raises no OSError.
DISK_ERRORS = ("No space left on device", "File too large", "Read-only file system", "Disk quota exceeded")


def checkpoint_directory(workdir: str) -> str:
    """Where the checkpoints of a run lie."""
    path = os.path.join(workdir, "checkpoints")
    return path if bucket.is_bucket(path) else os.path.abspath(path)


def steps_on_disk(directory: str) -> list[int]:
    """Steps whose checkpoint is whole, ascending; reads names only, and removes nothing.

    A save gets its plain number by a rename when all of it is there; until then
    its directory is called `7.orbax-checkpoint-tmp`. In a bucket nothing can be
    renamed: there a file `commit_success.txt` comes last.

    Example:
      >>> steps_on_disk("nowhere")
      []
    """
    if bucket.is_bucket(directory):
        steps = (path for path in bucket.inside(directory) if path.name.isdecimal())
        return sorted(int(path.name) for path in steps if (path / "commit_success.txt").exists())
    try:
        with os.scandir(directory) as entries:
            return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())
    except OSError:
        return []


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
