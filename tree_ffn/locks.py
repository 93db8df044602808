"""One writer at a time: a directory, or what is made at a path, is held by one process until it ends.

A lock is `flock` on a small file, so the kernel frees it however its holder ends: kill -9 leaves none.
Who only reads is not held up. On NFS a lock reaches all hosts, but for mounts with `nolock` or `local_lock`;
on a file system that has none (Lustre without `flock`, some of FUSE) a warning says that nobody watches.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import IO

from tree_ffn.errors import InputError

NAME = ".lock"

# The locks of this process, which may enter its own again.
_held: set[str] = set()


class InUse(Exception):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def only_writer(directory: str, field: str = "workdir") -> Iterator[None]:
    """Holds a directory to write in it; within, the same process may hold it again.

    Args:
      directory: made if it is not there, and removed at the end if it was and is empty.
      field: what named it, for the message.

    Raises:
      InputError: another process holds it (the message says which), or it cannot be written.

    Example:
      >>> with only_writer("runs/tree"):      # doctest: +SKIP
      ...     train_and_save()
    """
    with contextlib.ExitStack() as stack:
        try:
            if not os.path.isdir(directory):
                os.makedirs(directory)
                stack.callback(_remove_if_empty, directory)
            stack.enter_context(locked(os.path.join(directory, NAME)))
        except InUse as holder:
            raise InputError(
                f"{field}: {directory} is in use by {holder}; wait until it has ended, stop it, or name "
                "another directory."
            ) from None
        except OSError as error:
            raise InputError(f"{field}: {directory} cannot be written ({error.strerror}).") from error
        yield


@contextlib.contextmanager
def new_directory(directory: str, field: str) -> Iterator[None]:
    """`only_writer` of a directory that has to be new, or empty.

    Raises:
      InputError: as `only_writer`; or something is there already.
    """
    taken = InputError(f"{field}: {directory} is there already; name a new directory.")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise taken
    with only_writer(directory, field):
        if set(os.listdir(directory)) - {NAME}:
            raise taken
        yield


@contextlib.contextmanager
def locked(path: str, waits: Callable[[InUse], object] | None = None) -> Iterator[None]:
    """Holds the lock at `path`; the file goes with it.

    Args:
      path: of the file.
      waits: called with who holds it, before waiting until they have ended; None: it is not waited.

    Raises:
      InUse: another process holds it, and `waits` is None.
      OSError: the file cannot be made.
    """
    name = os.path.realpath(path)
    if name in _held:
        yield
        return
    with contextlib.closing(_open_locked(path, waits)):
        _held.add(name)
        try:
            yield
        finally:
            _held.discard(name)
            with contextlib.suppress(OSError):  # somebody else removed it
                os.remove(path)


def in_use(directory: str) -> bool:
    """Whether another process writes in a directory, as far as locks say."""
    path = os.path.join(directory, NAME)
    if os.path.realpath(path) in _held:
        return False
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _open_locked(path: str, waits: Callable[[InUse], object] | None) -> IO[str]:
    """The open lock file, which says who holds it."""
    tries = 0
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if tries < 3 else 0))
        except BlockingIOError:
            with file:
                tries += 1
                if tries == 3:
                    holder = InUse(_holder(file))
                    if waits is None:
                        raise holder from None
                    waits(holder)
            time.sleep(0.05)  # it may be a look of `in_use`
            continue
        except OSError as error:  # ENOLCK, ENOSYS, ...: the run is worth more than the lock
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): nothing keeps two writers apart there.",
                stacklevel=2,
            )
        if _is_at(file, path):
            break
        file.close()  # whoever held it has removed it since it was opened
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # a full disk is for others to say
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        file.flush()
    return file


def _is_at(file: IO[str], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    """`process 4711 on host node3 since 2026-11-30 09:00:00+00:00`, as its lock file says."""
    file.seek(0)
    try:
        return "process {pid} on host {host} since {since}".format(**json.loads(file.read()))
    except (ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"


def _remove_if_empty(directory: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(directory)
