"""The loop: restore, step, report, validate, save, stop."""

import contextlib
import os
import signal
from collections.abc import Callable

import jax
import numpy as np

from tree_ffn.data.pipeline import Batches, valid_batches
from tree_ffn.locks import only_writer
from tree_ffn.paths import local_or_bucket
from tree_ffn.training import bucket, distributed
from tree_ffn.training import workdir as workdirs
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.clock import Clock
from tree_ffn.training.compiled import Programs, compile_programs, keep_compiled
from tree_ffn.training.extras import Trace, check_wandb, wandb_writer
from tree_ffn.training.logger import Done, Report
from tree_ffn.training.plan import many_passes, plan_run, prepare_data, resolved
from tree_ffn.training.sharding import put_rows, rows_here
from tree_ffn.training.signals import Interrupted, StopSignals
from tree_ffn.upgrades import stamped


def train(
    config,
    workdir: str,
    *,
    log=print,
    bar: bool | None = None,
    origin: Callable[[], dict] | None = None,
    prepare=prepare_data,
    compile=compile_programs,
) -> dict[str, float]:
    """Trains a model, or goes on with the run that `workdir` holds.

    Args:
      config: as configs/default.py describes; a ConfigDict or anything with its attributes.
      workdir: where config.json, metrics.jsonl, tensorboard/ and checkpoints/ go.
      log: takes lines of text.
      bar: draw a progress bar; by default where stderr is a terminal.
      origin: tells where the run comes from (command, commit, versions); kept in origin.json with one
        entry for every start.
      prepare: makes the rows, as `plan.prepare_data` does.
      compile: makes what runs on devices, as `compile_programs` does.

    Returns:
      metrics of the final validation (`loss`, `ppl`, `bits_per_byte`, usage), with `step`,
      `train_loss`, `tokens_per_s`, `seconds_per_step`, and `passes` over the training text.

    Raises:
      InputError: the config, the data or the workdir cannot be used; another process may be writing there.
      Diverged: loss or gradient is not finite.
      Interrupted: SIGTERM, Ctrl-C or another of `signals.STOPS`; the state is saved.

    Example:
      >>> train(config, "runs/tree")["bits_per_byte"]        # doctest: +SKIP
      2.41
    """
    clock = Clock()
    with contextlib.ExitStack() as stack:
        with distributed.together():
            workdir, plan = local_or_bucket(workdir, "workdir"), plan_run(config)
            known, began = stamped(resolved(config)), origin() if origin else {}
        keep_compiled(plan.train.compile_cache)
        distributed.check_same(**workdirs.compared(known, began))
        distributed.check_mesh(plan.mesh)
        first = distributed.is_first()
        with distributed.together():
            check_wandb(plan.train.wandb)
            if first and bucket.is_bucket(workdir):
                bucket.check_writable(workdir)
            elif first:
                stack.enter_context(only_writer(workdir))
                stack.enter_context(workdirs.unmade_if_empty(workdir))
        distributed.check_shared(workdir)
        with distributed.together():
            checkpoints = stack.enter_context(workdirs.open_workdir(workdir, config, plan.train, log))
            plan = workdirs.with_own_model(plan, checkpoints)
            folder = stack.enter_context(bucket.folder(workdir, first))
            data = prepare(config, plan.model, log)
        distributed.check_same(data=data.meta)
        stack.enter_context(jax.set_mesh(plan.mesh))
        stop = stack.enter_context(distributed.stop_signals())
        with distributed.together():
            run = Run(plan, data, known, folder, checkpoints, compile(plan), log, clock)
        also = None
        with distributed.together():
            if first:
                workdirs.write_json(workdir, "config.json", known)
                workdirs.write_json(workdir, "data.json", data.meta)
                if origin:
                    workdirs.add_origin(workdir, {"step": run.step, **began})
                if project := plan.train.wandb:
                    also = wandb_writer(project, workdirs.wandb_id(workdir), folder.path, known)
        bytes_per_token = data.meta["bytes_per_token"]
        report = Report(folder.path, plan, bytes_per_token, run.step, log, bar, first, also)
        stack.enter_context(report)
        report.passes = plan.train.passes(len(data.train))
        if run.step:
            report.say(f"resumed at step {run.step} of {plan.train.steps}")
        if said := many_passes(report.passes):
            report.say(said)
        valid = run.train(report, stop)
        if said := many_passes(report.passes, "was"):
            report.say(said)
        return valid | {"passes": report.passes}


class Run:
    """A run in progress: its state, and what can be done with it.

    Args:
      plan: the checked config.
      data: prepared corpus.
      config: resolved config, for the checkpoints.
      folder: where files of the run grow.
      checkpoints: of its workdir; the latest is restored if there is one.
      programs: what runs on devices.
      log: takes lines of text.
      clock: began with the run.

    Attributes:
      step: finished steps.
      state: the TrainState after them.
    """

    def __init__(
        self, plan, data, config: dict, folder: bucket.Folder, checkpoints: Checkpoints,
        programs: Programs, log, clock: Clock,
    ):  # fmt: skip
        self.plan, self.data, size = plan, data, plan.train.batch_size
        self._here = rows_here(plan.mesh, size)
        self.batches = Batches(data.train, size, plan.seed, plan.corpus.workers, self._here)
        self.folder, self.checkpoints = folder, checkpoints
        self._meta = {"config": config, "data": data.meta, **workdirs.kept_meta(checkpoints)}
        self._programs, self._clock = programs, clock
        if checkpoints.latest is None:
            self.state = self._programs.init(jax.random.key(plan.seed))
        else:
            workdirs.check_same_data(folder.workdir, checkpoints.meta()["data"], data.meta)
            self.state = checkpoints.restore_newest(self._programs.abstract, log)
            clock.goes_on(checkpoints.meta().get("spent"))
        self.step = int(self.state.step)

    def train(self, report: Report, stop: StopSignals) -> dict[str, float]:
        """The steps that are left; metrics of the final validation."""
        spec, usage, waiting, valid = self.plan.train, self._programs.scorer.empty_usage(), None, {}
        if report.usage.forgot and self.step < spec.steps:
            report.usage.remember(self._score(1))
        if self._missed_validation():
            self._save(self.validate(report)["loss"])
        if self.step < spec.steps:
            report.say("compiling the training step ...")
        with contextlib.closing(self._rows()) as rows, self._trace() as trace:
            while self.step < spec.steps:
                with self._clock.during("reading"):
                    batch = next(rows)
                batch = put_rows(batch, self._here, spec.batch_size, self.plan.mesh)
                self.state, usage, metrics = self._train_step(report)(self.state, usage, batch)
                self.step += 1
                self._clock.to("steps")  # it has compiled
                trace.step(self.step, metrics)
                if waiting:  # the metrics of a step are fetched when the next one is under way
                    report.step(waiting)
                waiting = Done(self.step, metrics, None)
                if self._due(spec.log_every):
                    waiting = waiting._replace(usage=usage, note=self._note())
                    usage = self._programs.scorer.empty_usage()
                save, why = self._due(spec.checkpoint_every), self._stops(stop)
                scores = save or self._due(spec.eval_every)
                saves_by_time = self._by_time(lambda: self._clock.saves(spec.checkpoint_minutes))
                if scores or why or saves_by_time:
                    report.step(waiting)  # nothing is saved before its loss is known to be a number
                    waiting = None
                    if why or not scores:
                        report.usage.flush(self.step)
                    if why:
                        self._interrupt(*why)
                    valid = self.validate(report) if scores else {}
                if save or saves_by_time:
                    self._save(valid.get("loss"))
        self._wait()
        if not valid:  # nothing was left to do, but for what a stop in the last step left out
            scored = self.checkpoints.is_scored(self.step)
            valid = self.validate(report, write=not scored)
            if not scored:
                self._save(valid["loss"])
                self._wait()
        report.say(f"{self._clock}")
        if self.data.lost:
            report.say(self.data.lost)
        return report.summary | valid | {"step": self.step}

    def _train_step(self, report: Report):
        """The program of the next step."""
        late = self._programs.late
        if late is None or self.step < late.first:
            return self._programs.train_step
        if self.step == late.first:
            report.say("the dense start is over: compiling a training step of the chosen experts alone ...")
        return late.train_step

    def _missed_validation(self) -> bool:
        """Whether a validation was due at the step of the checkpoint, and a stop came first."""
        is_due = 0 < self.step < self.plan.train.steps and self._due(self.plan.train.eval_every)
        return is_due and not self.checkpoints.is_scored(self.step)

    def _rows(self):
        """Batches from here on; a generator, so that closing it stops threads that read ahead."""
        yield from self.batches.iterate(self.step)

    def _save(self, val_loss: float | None = None) -> None:
        with self._clock.during("saving"):
            if distributed.is_first():
                self.folder.upload()
            self.checkpoints.save(self.state, self._meta | {"spent": self._clock.spent()}, val_loss)

    def _wait(self) -> None:
        with self._clock.during("saving"):
            self.checkpoints.wait()

    def _note(self) -> str:
        return distributed.slowest(distributed.shares_of_all(self._clock.share_of_reading()))

    def _trace(self) -> Trace:
        at = self.plan.train.profile_at if distributed.is_first() else 0
        return Trace(os.path.join(self.folder.path, "profile"), at)

    def _by_time(self, asked: Callable[[], bool]) -> bool:
        """What the clock of process 0 says; it is asked every `log_every` steps, but for the last."""
        spec = self.plan.train
        if not (spec.max_hours or spec.checkpoint_minutes) or self.step % spec.log_every:
            return False
        return self.step < spec.steps and distributed.as_first_says(asked())

    def _stops(self, stop: StopSignals) -> tuple[str, int] | None:
        """Why the run stops after this step, and the signal that its exit code tells of."""
        if signum := stop.at(self.step):
            return signal.Signals(signum).name, signum
        hours = self.plan.train.max_hours
        if self._by_time(lambda: self._clock.is_over(hours)):
            return f"train.max_hours = {hours:g}", signal.SIGTERM
        return None

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps is due now; everything is at the end."""
        return self.step == self.plan.train.steps or (every > 0 and self.step % every == 0)

    def validate(self, report: Report, write: bool = True) -> dict[str, float]:
        """Loss and usage over the fixed validation batches, reported and returned."""
        spec, probed = self.plan.train, None
        with self._clock.during("validation"):
            if self._programs.probe:
                first = next(valid_batches(self.data.valid, spec.microbatch, 1))
                microbatch = np.resize(first, (spec.microbatch, first.shape[1]))
                probed = self._programs.probe(self.state.variables, microbatch)
            return report.valid(self.step, self._score(spec.eval_batches), probed, write)

    def _score(self, n_batches: int):
        """Of as many rows as so many batches have, a microbatch at a time: there is no room for more."""
        spec = self.plan.train
        batches = valid_batches(self.data.valid, spec.microbatch, n_batches * spec.grad_accum_steps)
        return self._programs.scorer(self.state.variables, batches)

    def _interrupt(self, why: str, signum: int):
        """Saves, waits, and leaves with a line that says how to resume."""
        self._save()
        self._wait()
        raise Interrupted(
            f"stopped by {why} after step {self.step} of {self.plan.train.steps}; "
            f"the state is saved in {self.folder.workdir}: run the same command again to resume.",
            signum,
        )
