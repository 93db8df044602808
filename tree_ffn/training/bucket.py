"""Workdirs in a bucket of Google Cloud Storage: gs://BUCKET/PATH.

Checkpoints and JSON files are written there. A bucket appends to no file, so those that grow (metrics,
events, usage) lie in a folder of this machine, and go there at every checkpoint; a start fetches them.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator

from etils import epath

from tree_ffn.errors import InputError, reason
from tree_ffn.training.usage_log import LEAVES, USAGE

with contextlib.suppress(ImportError):
    import fsspec.config

    # Lists of files are asked for anew each time: other processes write there too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with a traceback what it raises

# What a start needs of the files that grow, beside usage.
_FETCHED = ("metrics.jsonl", LEAVES)


def is_bucket(path: str) -> bool:
    """Whether a path is in a bucket.

    Example:
      >>> is_bucket("gs://runs/tree"), is_bucket("runs/tree")
      (True, False)
    """
    return path.startswith("gs://")


@contextlib.contextmanager
def reached(path: str, what: str = "written") -> Iterator[None]:
    """Says in one sentence why something in a bucket cannot be read or written; elsewhere it does nothing.

    Raises:
      InputError: in place of any exception, since gcsfs and what it uses have no one kind; but of a missing
        file.
    """
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except ImportError as error:
        raise InputError(f"workdir: {path} needs the package gcsfs; install tree_ffn[gcs].") from error
    except Exception as error:
        if not is_bucket(path):
            raise
        raise InputError(f"workdir: {path} cannot be {what} ({reason(error)}).") from error


def check_writable(workdir: str) -> None:
    """Raises InputError where nothing can be written to a bucket."""
    probe = epath.Path(workdir) / ".writable"
    try:
        with reached(workdir):
            probe.write_text("")
            probe.unlink()
    except FileNotFoundError as error:
        raise InputError(f"workdir: {workdir} cannot be written (there is no such bucket).") from error


def inside(directory: str) -> list[epath.Path]:
    """What is in a directory, if it is there.

    Raises:
      InputError: it is in a bucket that cannot be read.
    """
    try:
        with reached(directory, "read"):
            return list(epath.Path(directory).iterdir())
    except FileNotFoundError:
        return []


class Folder:
    """Where files of a run grow.

    Args:
      workdir: of the run.
      path: the folder on this machine, which is the workdir itself where that is no bucket.

    Attributes:
      workdir, path: as given.
    """

    def __init__(self, workdir: str, path: str):
        self.workdir, self.path = workdir, path
        self._uploaded: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Copies what the bucket has of an earlier start.

        Raises:
          InputError: it cannot be read.
        """
        root = epath.Path(self.workdir)
        with reached(self.workdir, "read"):
            files = [path for path in inside(self.workdir) if path.name in _FETCHED]
            for file in [*files, *inside(f"{self.workdir}/{USAGE}")]:
                to = epath.Path(self.path) / file.relative_to(root)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(file.read_bytes())
        self._uploaded = self._files()

    def upload(self) -> None:
        """Copies what has changed since the last time, and removes there what is gone here.

        Raises:
          InputError: the bucket cannot be written.
        """
        if not is_bucket(self.workdir):
            return
        root, found = epath.Path(self.workdir), self._files()
        with reached(self.workdir):
            for name, state in found.items():
                if self._uploaded.get(name) != state:
                    (root / name).write_bytes(epath.Path(self.path, name).read_bytes())
            for name in self._uploaded.keys() - found.keys():
                (root / name).unlink(missing_ok=True)
        self._uploaded = found

    def _files(self) -> dict[str, tuple[int, int]]:
        """{name: (time of change, size)}."""
        paths = [os.path.join(top, name) for top, _, names in os.walk(self.path) for name in names]
        stats = {os.path.relpath(path, self.path): os.stat(path) for path in paths}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


@contextlib.contextmanager
def folder(workdir: str, writes: bool) -> Iterator[Folder]:
    """The `Folder` of a run; at the end all of it is where the run is.

    Args:
      workdir: of the run.
      writes: False in all but one of several processes.
    """
    if not is_bucket(workdir):
        yield Folder(workdir, workdir)
        return
    with tempfile.TemporaryDirectory(prefix="tree_ffn_") as path:
        found = Folder(workdir, path)
        found.fetch()
        try:
            yield found
        except InputError:  # it may be the bucket's own
            raise
        except BaseException:
            if writes:
                with contextlib.suppress(InputError):  # the first message counts
                    found.upload()
            raise
        if writes:
            found.upload()
