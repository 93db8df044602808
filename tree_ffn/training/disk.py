"""What a workdir's disk says: which checkpoints are whole on it, and why a write failed."""

import os

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
