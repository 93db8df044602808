"""A run of several processes: how they meet, what they compare, how they end.

All run the same program, each on the devices that it sees, and all compute. Process 0 alone writes, but for
checkpoints, of which each process saves its part. With one process everything here does nothing.

Processes find each other as jax.distributed does: by SLURM, Open MPI, a Cloud TPU or Kubernetes; otherwise
the environment says JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import atexit
import contextlib
import glob
import json
import os
import re
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tree_ffn.errors import InputError, is_whole_number, reason
from tree_ffn.json_output import json_text
from tree_ffn.paths import writing
from tree_ffn.plain import flat
from tree_ffn.training import bucket, last_words
from tree_ffn.training.signals import STOPS, Diverged, Interrupted, StopSignals

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Variables by which launchers say how many processes there are, and signs that jax.distributed may find more.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_SIGNS = (ADDRESS, "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX")
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# What says that it is not this process that failed: the words of gloo, of NCCL, and of JAX's service.
_OF_OTHERS = ("gloo", "nccl", "connection", "socket", "unavailable", "barrier", "coordination", "heartbeat")


class Refused(InputError):
    """All processes raise it, since it was raised in at least one."""


@contextlib.contextmanager
def started(heartbeat: int) -> Iterator[None]:
    """Connects the processes of a run, before anything else asks JAX for devices; they leave together.

    Where another process ends early, JAX aborts this one within `heartbeat` seconds (exit code 134), and one
    sentence says so. Where this one fails alone, it leaves the others without waiting for them.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as lost.

    Raises:
      InputError: the environment does not say where the others are.
    """
    if not _connect(heartbeat):
        yield
        return
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # what is printed is said once
    try:
        yield
        multihost_utils.sync_global_devices("all have done their part")
    except (Refused, Interrupted, Diverged):
        raise
    except BaseException as error:
        if not isinstance(error, InputError) and _is_of_others(error):
            time.sleep(heartbeat + 5)  # by then JAX has found out which one is lost, and aborts
        code = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        atexit.register(_leave, code)  # before JAX's own, which would wait for the others
        raise


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_of_others(error: BaseException) -> bool:
    said = str(error).lower()
    return any(word in said for word in _OF_OTHERS)


def _connect(heartbeat: int) -> bool:
    """Whether this is one of several processes; then they are connected."""
    count, index = _number(COUNT), _number(INDEX)
    alone = count == 1 or (count is None and any(os.environ.get(name) == "1" for name in _COUNTS))
    signs = any(map(os.environ.get, _SIGNS)) or any(map(glob.glob, _TPU_DEVICES))
    if alone or not (signs or count):
        return False
    _check_address(is_needed=not signs)
    forget_slices()
    last_words.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pod without the package that detection in pods needs: it is alone
        try:
            jax.distributed.initialize(
                num_processes=count, process_id=index, heartbeat_timeout_seconds=heartbeat
            )
        except (ValueError, RuntimeError) as error:
            if os.environ.get(ADDRESS):
                raise InputError(
                    f"{ADDRESS}: {os.environ[ADDRESS]!r} cannot be used ({reason(error)}); every process "
                    f"needs host:port of process 0, {COUNT}, and {INDEX} from 0."
                ) from error
            if isinstance(error, RuntimeError):
                raise
            return False
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which JAX has taken for its preemption service
    return jax.process_count() > 1


def _check_address(is_needed: bool) -> None:
    address = os.environ.get(ADDRESS, "")
    if (address or is_needed) and not re.search(r".:\d+$", address):
        raise InputError(f"{ADDRESS}: {address!r} is not allowed; use host:port of process 0.")


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None or is_whole_number(value):
        return None if value is None else int(value)
    raise InputError(f"{name}: {value!r} is not allowed; use a whole number.")


def forget_slices() -> None:
    """Drops what is left of a job of several slices, by which JAX would wait for hosts that are gone.

    A run spans one slice of TPUs.
    """
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        if os.environ.get(name):
            os.environ[name] = ""  # and not unset: then JAX would ask the machine's metadata


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def texts_of_all(text: str) -> list[str]:
    """A text of each process, in their order; every process calls it."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def as_first_says(flag: bool) -> bool:
    """The flag of process 0, known to all; every process calls it."""
    return texts_of_all(str(flag))[0] == str(True)


def shares_of_all(share: float) -> list[float]:
    """A number of each process, in their order; every process calls it."""
    return [float(text) for text in texts_of_all(repr(share))]


def slowest(shares: list[float]) -> str:
    """Which of several processes waits longest for its text, if it is 5 % of the time; all wait for it.

    Args:
      shares: of the time, of each process.

    Example:
      >>> slowest([0.01, 0.4, 0.0]), slowest([0.4]), slowest([0.0, 0.04])
      (', process 1 waits for text 40 %', '', '')
    """
    worst = max(range(len(shares)), key=shares.__getitem__)
    is_said = len(shares) > 1 and shares[worst] >= 0.05
    return f", process {worst} waits for text {100 * shares[worst]:.0f} %" if is_said else ""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses within, all refuse, and say which one it was.

    Raises:
      InputError: raised within, in this process or in another.
    """
    error = None
    try:
        yield
    except InputError as found:
        error = found
    for process, said in enumerate(texts_of_all(str(error or ""))):
        if said and jax.process_count() > 1:
            raise Refused(f"process {process}: {said}") from error
    if error:
        raise error


def check_same(**facts: dict) -> None:
    """Raises InputError where a fact is another in some process than in process 0.

    Args:
      **facts: by name, dicts of JSON's kinds.
    """
    if jax.process_count() == 1:
        return
    texts = texts_of_all(json_text(facts, "facts of a run"))
    first, *others = (flat(json.loads(text)) for text in texts)
    for process, found in enumerate(others, start=1):
        keys = sorted(key for key in first.keys() | found.keys() if first.get(key) != found.get(key))
        if keys:
            said = [f"{key} is {found.get(key)!r}, but {first.get(key)!r} in process 0" for key in keys[:3]]
            said = ", ".join([*said, *([f"and {len(keys) - 3} more"] if keys[3:] else [])])
            raise Refused(f"process {process}: {said}; start all with the same command, code and text.")


def check_shared(workdir: str) -> None:
    """Raises InputError unless all processes see the same directory at `workdir`.

    Args:
      workdir: on a disk that every host mounts; it is there.
    """
    if jax.process_count() == 1:
        return
    path = epath.Path(workdir) / ".shared"
    with together():
        written = str(uuid.uuid4()) if is_first() else ""
        if is_first():
            with bucket.reached(workdir), writing(str(path)):
                path.write_text(written)
    written = texts_of_all(written)[0]
    with together():
        try:
            with bucket.reached(workdir, "read"):
                found = path.read_text()
        except OSError:
            found = ""
        if found != written:
            raise InputError(
                f"workdir: {workdir} is not the directory that process 0 sees; name one that all hosts share."
            )
    if is_first():
        path.unlink()


def check_mesh(mesh: jax.sharding.Mesh) -> None:
    """Raises InputError where a mesh leaves all devices of a process out."""
    left = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if left:
        said = f"data={mesh.shape['data']}, model={mesh.shape['model']}"
        raise Refused(
            f"mesh: {said} leaves process {min(left)} without work; use all {jax.device_count()} devices."
        )


class StopsOfAll(StopSignals):
    """A stop of any process is one of all, after the same step: JAX's preemption service agrees on it.

    SIGTERM is that service's own from the start; the others of STOPS are passed on to it.
    """

    signals = tuple(set(STOPS) - {signal.SIGTERM})

    def at(self, step: int) -> int | None:
        """SIGTERM if the run stops after step number `step`; every process asks after every step."""
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def _receive(self, signum, frame):
        super()._receive(signum, frame)
        os.kill(os.getpid(), signal.SIGTERM)


def stop_signals() -> StopSignals:
    """What tells a run to stop."""
    return StopsOfAll() if jax.process_count() > 1 else StopSignals()
