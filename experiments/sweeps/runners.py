"""Two ways to make the runs of a sweep: one by one in this process, or as processes of their program."""

import functools
import itertools
import os
import shutil
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from experiments.common.processes import Job, Processes, why
from experiments.common.provenance import origin, public_command
from experiments.conversion.finetuning import finetune
from experiments.reporting import record, texts
from experiments.sweeps.sweep_runs import Known, Run
from tree_ffn.errors import InputError, reason
from tree_ffn.training.loop import train
from tree_ffn.training.signals import Diverged, Interrupted

# What a finished run may lose with --keep_runs=false; its metrics, usage and config stay.
LARGE = ("checkpoints", "tensorboard")
LOG = "log.txt"
SWEEP = "the sweep"  # what a signal stops

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
          Interrupted: one of `signals.STOPS`; what was under way is saved.
        """
        clock = _Clock(len(runs), self.jobs, say)
        for run, following in itertools.zip_longest(runs, runs[1:]):
            say(f"\n{run.label}: {run.config.train.steps} steps in {run.workdir}")
            began = time.perf_counter()
            error = self._one(run)
            # Compiled programs and their constants would pile up over the rows; another seed has the same.
            if following is None or record.config_hash(following.config) != record.config_hash(run.config):
                jax.clear_caches()
            self._ended(run, error, time.perf_counter() - began, clock)

    def _one(self, run: Run) -> str | None:
        try:
            _make(run)
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


def _make(run: Run) -> None:
    """Trains, scores, and records last: a run whose validation loss is recorded counts as done."""
    command = public_command([run.program, *run.arguments()])
    names: dict[str, Any] = {"table": run.table, "row": run.name, "results": run.results, "command": command}
    other = texts.parse(run.texts)
    if run.start:
        finetune(run.config, run.workdir, other=other, **names)
        return
    figures = train(run.config, run.workdir, origin=functools.partial(origin, command))
    if other:
        texts.score_at_end(run.workdir, run.config, other, **names)
    record.append_figures(names.pop("results"), figures, config=run.config, data_meta=run.facts(), **names)


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
    """Makes runs as processes of their program, several at a time; each writes log.txt in its workdir.

    Args:
      keep_runs: as in `Runner`.
      jobs, gpus: as in `Processes`.
    """

    def __init__(self, keep_runs: bool, jobs: int, gpus: list[str]):
        super().__init__(keep_runs)
        self.jobs, self._processes = jobs, Processes(jobs, gpus)

    def make(self, runs: list[Run], say: Say = say_now) -> None:
        """As in `Runner`; after a signal the processes save before this returns."""
        clock, waiting, by_log = _Clock(len(runs), self.jobs, say), list(runs), {}

        def next_job() -> Job | None:
            if not waiting:
                return None
            run = waiting.pop(0)
            log = os.path.join(run.workdir, LOG)
            by_log[log] = run
            return Job(run.label, [f"experiments.{run.program}", *run.arguments()], log)

        def ended(job: Job, code: int, seconds: float) -> None:
            run = by_log[job.log]
            self._ended(run, self._error(run, code), seconds, clock)

        self._processes.run(next_job, ended, SWEEP)

    def _error(self, run: Run, code: int) -> str | None:
        """None if the run is recorded: a process that was told to stop exits with 0 too."""
        if code == 0 and Known(run.results).loss(run) is not None:
            return None
        return why(os.path.join(run.workdir, LOG), code)
