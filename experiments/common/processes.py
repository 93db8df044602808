"""Several processes at a time: programs of this package that run side by side and stop as one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tree_ffn.errors import InputError
from tree_ffn.training.signals import Interrupted, StopSignals


class Job(NamedTuple):
    """A program to run.

    Attributes:
      label: what people call it.
      words: the command line after `python -m`.
      log: file that its output is appended to.
    """

    label: str
    words: list[str]
    log: str


class Processes:
    """Runs jobs as processes, several at a time.

    Args:
      jobs: processes at a time.
      gpus: numbers of the GPUs that they take in turns; empty: all see all devices.
    """

    def __init__(self, jobs: int, gpus: list[str]):
        self.jobs, self.gpus = jobs, gpus

    def run(
        self, next_job: Callable[[], Job | None], ended: Callable[[Job, int, float], object], what: str
    ) -> None:
        """Runs what `next_job` gives, until it gives nothing and nothing runs.

        Args:
          next_job: the job to start next; None: there is none until another has ended.
          ended: called with every job that ended, its exit code and its seconds.
          what: what a signal stops, for the message.

        Raises:
          Interrupted: one of `signals.STOPS`; the processes have saved and ended.
        """
        running, waits = {}, False
        with StopSignals() as stop:
            try:
                while not stop.received:
                    for slot in set(range(self.jobs)) - running.keys():
                        job = None if waits else next_job()
                        waits = job is None
                        if job is not None:
                            running[slot] = job, self._start(job, slot), time.perf_counter()
                    if not running:
                        break
                    time.sleep(0.05)
                    for slot, (job, process, began) in list(running.items()):
                        if process.poll() is not None:
                            del running[slot]
                            ended(job, process.returncode, time.perf_counter() - began)
                            waits = False
            finally:
                _stop(process for _, process, _ in running.values())
        if stop.received:
            raise stopped(stop.received, what)

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        """A process of its own session: Ctrl-C reaches it through us, once."""
        try:
            os.makedirs(os.path.dirname(job.log), exist_ok=True)
            log = open(job.log, "a", encoding="utf-8")
        except OSError as error:
            place = os.path.dirname(job.log)
            raise InputError(f"--workdir: {place} cannot be written ({error.strerror}).") from error
        with log:
            words = [sys.executable, "-m", *job.words]
            return subprocess.Popen(
                words, env=self.environment(slot), stdout=log, stderr=log, start_new_session=True
            )

    def environment(self, slot: int) -> dict[str, str]:
        """One GPU of --gpus, a fair part of its memory where several share it, and no threads of BLAS.

        Processes, and threads of ours in them, fill the cores; those of OpenBLAS, as many in every process
        as there are cores, would take turns with each other.
        """
        values = dict(os.environ)
        values.setdefault("OPENBLAS_NUM_THREADS", "1")
        if self.gpus:
            values["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        sharers = -(-self.jobs // len(self.gpus)) if self.gpus else self.jobs
        if sharers > 1:
            values.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / sharers:.2f}")
        return values


def why(log: str, code: int) -> str:
    """Why a job failed, by its exit code and the last line of its log."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    said = lines[-1] if lines else "no output"
    said = said.split(".py: ", 1)[1] if said.split(" ")[0].endswith(".py:") else said
    if code < 0:  # then its last line is of something else
        return f"killed by signal {-code} after: {said} ({log})"
    return f"{said} ({log})" if lines else f"{said}, exit code {code} ({log})"


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks processes to save and end, and waits for all of them."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def stopped(signum: int, what: str) -> Interrupted:
    """What is raised after a signal."""
    return Interrupted(
        f"{what} stopped; what was under way is saved: run the same command again to go on.", signum
    )
