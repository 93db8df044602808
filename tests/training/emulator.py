"""A bucket on this machine: gcp-storage-emulator, a process, where it and gcsfs are installed."""

import errno
import importlib.util
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

from tests.training.several import free_port

NAME = "runs"
PACKAGES = ("gcp_storage_emulator", "gcsfs")


def is_installed() -> bool:
    """Whether there can be one."""
    return all(map(importlib.util.find_spec, PACKAGES))


class Bucket:
    """gs://runs, whose objects are files below `directory`; with it as a context, the emulator runs.

    Args:
      directory: where they lie; made if it is not there.

    Attributes:
      variables: the environment of processes that are to find it.
    """

    def __init__(self, directory: pathlib.Path):
        # Below those that connections begin at: one could meet itself there while nobody listens.
        self._directory, self._port = directory, free_port(9000 + random.randrange(9000))
        address = f"http://127.0.0.1:{self._port}"
        self.variables = {
            "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }  # fmt: skip

    def __enter__(self) -> "Bucket":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def url(self, name: str) -> str:
        """gs://runs/NAME."""
        return f"gs://{NAME}/{name}"

    def files(self, name: str) -> pathlib.Path:
        """Where the objects below `url` lie."""
        return self._directory / ".cloudstorage" / NAME / name

    def steps(self, name: str) -> list[int]:
        """Whole checkpoints of the run below `url`."""
        done = self.files(name).glob("checkpoints/*/commit_success.txt")
        return sorted(int(path.parent.name) for path in done)

    def start(self) -> None:
        """Starts the emulator, on the same port and with the same objects each time."""
        command = [
            sys.executable, "-m", "gcp_storage_emulator", "-d", str(self._directory), "start",
            "--host", "127.0.0.1", "--port", str(self._port), "--default-bucket", NAME, "-q",
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=os.environ | self.variables, **quiet)
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self._process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self) -> None:
        """Kills it; its objects stay."""
        self._process.kill()
        self._process.wait()

    def _listens(self) -> bool:
        with socket.socket() as asked:
            asked.settimeout(0.5)  # it answers one request at a time: others wait, but none is refused
            return asked.connect_ex(("127.0.0.1", self._port)) != errno.ECONNREFUSED
