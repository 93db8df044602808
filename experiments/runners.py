"""Two ways to make the runs of a sweep: one by one in this process, or as processes of experiments.train."""

import functools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable

import jax

from experiments import record, texts
from experiments.provenance import origin, public_command
from experiments.sweep_runs import Known, Run, facts
from tree_ffn.errors import InputError, reason
from tree_ffn.training.loop import train
from tree_ffn.training.signals import Diverged, Interrupted, StopSignals

# What a finished run may lose with --keep_runs=false; its metrics, usage and config stay.
LARGE = ("checkpoints", "tensorboard")
LOG = "log.txt"

Say = Callable[[str], None]
say_now = functools.partial(print, flush=True)  # a log that is followed shows each line at once


class Runner:
    """Makes runs one after the other in this process.

    Args:
      keep_runs: keep the checkpoints of finished runs.

    Attributes:
      failed: {label: sentence} of the runs that did not end well so far.
    """

    jobs = 1

    def __init__(self, keep_runs: bool = True):
        self.keep_runs, self.failed = keep_runs, {}

    def make(self, runs: list[Run], say: Say = say_now) -> None:
        """Makes runs; a failure is noted and the next one begins.

        Raises:
          Interrupted: SIGTERM or Ctrl-C; what was under way is saved.
        """
        clock = _Clock(len(runs), self.jobs, say)
        for run in runs:
            say(f"\n{run.label}: {run.config.train.steps} steps in {run.workdir}")
            began = time.perf_counter()
            error = self._one(run)
            # Compiled programs and their constants would pile up over the rows.
            jax.clear_caches()
            self._ended(run, error, time.perf_counter() - began, clock)

    def _one(self, run: Run) -> str | None:
        try:
            names = {"table": run.table, "row": run.name}
            command = public_command(["train", *run.arguments()])
            figures = train(run.config, run.workdir, origin=functools.partial(origin, command))
            if other := texts.parse(run.texts):
                texts.score_at_end(
                    run.workdir, run.config, other, results=run.results, command=command, **names
                )
            # Last: a run whose validation loss is recorded counts as done.
            record.append_figures(
                run.results, figures, config=run.config, data_meta=facts(run.config), command=command, **names
            )
        except Interrupted:
            raise
        except (InputError, Diverged) as error:
            return str(error)
        except Exception as error:  # out of memory, a bug: the others go on
            traceback.print_exc()
            return f"{type(error).__name__}: {reason(error)}"
        return None

    def _ended(self, run: Run, error: str | None, seconds: float, clock: "_Clock") -> None:
        if error:
            self.failed[run.label] = error
        elif not self.keep_runs:
            for name in LARGE:
                shutil.rmtree(os.path.join(run.workdir, name), ignore_errors=True)
        clock.ended(f"{run.label}: {f'FAILED: {error}' if error else 'done'}", seconds)


class _Clock:
    """Says how many runs are done, and about how long the others will take."""

    def __init__(self, n_runs: int, jobs: int, say: Say):
        self._left, self._jobs, self._say, self._seconds = n_runs, jobs, say, []

    def ended(self, text: str, seconds: float) -> None:
        self._seconds.append(seconds)
        self._left -= 1
        left = sum(self._seconds) / len(self._seconds) * self._left / self._jobs / 60
        after = f", {self._left} left (about {left:.0f} min)" if self._left else ""
        self._say(f"{text} in {seconds:.0f} s{after}")


class ProcessRunner(Runner):
    """Makes runs as processes of experiments.train, several at a time; each writes log.txt in its workdir.

    Args:
      keep_runs: as in `Runner`.
      jobs: processes at a time.
      gpus: numbers of the GPUs that they take in turns; empty: all see all devices.
    """

    def __init__(self, keep_runs: bool, jobs: int, gpus: list[str]):
        super().__init__(keep_runs)
        self.jobs, self.gpus = jobs, gpus

    def make(self, runs: list[Run], say: Say = say_now) -> None:
        """As in `Runner`; after a signal the processes save before this returns."""
        clock, waiting, running = _Clock(len(runs), self.jobs, say), list(runs), {}
        with StopSignals() as stop:
            try:
                while (waiting or running) and not stop.received:
                    for slot in set(range(self.jobs)) - running.keys():
                        if waiting:
                            running[slot] = self._start(waiting.pop(0), slot), time.perf_counter()
                    time.sleep(0.05)
                    for slot, ((run, process), began) in list(running.items()):
                        if process.poll() is not None:
                            del running[slot]
                            self._ended(run, self._error(run, process), time.perf_counter() - began, clock)
            finally:
                _stop(process for (_, process), _ in running.values())
        if stop.received:
            raise stopped(stop.received)

    def _start(self, run: Run, slot: int) -> tuple[Run, subprocess.Popen]:
        """A process of its own session: Ctrl-C reaches it through us, once."""
        try:
            os.makedirs(run.workdir, exist_ok=True)
            log = open(os.path.join(run.workdir, LOG), "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--workdir: {run.workdir} cannot be written ({error.strerror}).") from error
        with log:
            words = [sys.executable, "-m", "experiments.train", *run.arguments()]
            process = subprocess.Popen(
                words, env=self._environment(slot), stdout=log, stderr=log, start_new_session=True
            )
        return run, process

    def _environment(self, slot: int) -> dict[str, str]:
        """One GPU of --gpus, and a fair part of its memory where several share it."""
        values = dict(os.environ)
        if self.gpus:
            values["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
            sharers = -(-self.jobs // len(self.gpus))
            if sharers > 1:
                values.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / sharers:.2f}")
        return values

    def _error(self, run: Run, process: subprocess.Popen) -> str | None:
        """None if the run is recorded: a process that was told to stop exits with 0 too."""
        if process.returncode == 0 and Known(run.results).loss(run) is not None:
            return None
        log = os.path.join(run.workdir, LOG)
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        said = lines[-1].removeprefix("train.py: ") if lines else "no output"
        if process.returncode < 0:  # then its last line is of something else
            return f"killed by signal {-process.returncode} after: {said} ({log})"
        return f"{said} ({log})" if lines else f"{said}, exit code {process.returncode} ({log})"


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks processes to save and end, and waits for all of them."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def stopped(signum: int) -> Interrupted:
    """What a sweep raises after a signal."""
    return Interrupted(
        "the sweep stopped; what was under way is saved: run the same command again to go on.", signum
    )
