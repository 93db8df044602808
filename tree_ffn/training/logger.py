"""Everything a run says: checks each step's metrics, and sends them to file, events and terminal.

metrics.jsonl has one flat JSON object a line: step, split, metrics.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from tree_ffn.errors import InputError
from tree_ffn.json_output import json_text
from tree_ffn.models.spec import FFNSpec
from tree_ffn.paths import replacing, writing
from tree_ffn.progress import RunProgress
from tree_ffn.training.compiled import Score
from tree_ffn.training.metrics import Throughput, costs, loss_metrics, usage_metrics
from tree_ffn.training.signals import Diverged
from tree_ffn.training.step import empty_usage
from tree_ffn.training.usage_log import UsageLog
from tree_ffn.tree import LeafSpec, TreeSpec

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its classes when it is imported)


# A function (step, scalars) that writes them; the step None closes it.
Writer = Callable[[int | None, dict[str, float]], None]


class Done(NamedTuple):
    """A step that was dispatched: its number, and metrics that may not be there yet.

    Attributes:
      step: finished steps, this one included.
      metrics: scalars on the device, as `step.train_step` gives them.
      usage: visit counts since the last line, where a line is due; else None.
      note: what else the line says.
    """

    step: int
    metrics: dict
    usage: tuple | None
    note: str = ""


class Report:
    """One writer for a run.

    Args:
      workdir: directory of the run.
      plan: a `plan.Plan`.
      bytes_per_token: of the validation split, for bits per byte.
      start: finished steps when the run starts or resumes.
      log: takes plain lines.
      bar: draw a bar; None where stderr is a terminal.
      writes: False in all but one of several processes: figures are computed, nothing is written or said.
      also: one more writer of metrics, as `extras.wandb_writer`.

    Attributes:
      passes: how often the whole run reads the training text; 0 where that is not known.
    """

    def __init__(
        self, workdir: str, plan, bytes_per_token: float, start: int, log, bar: bool | None,
        writes: bool = True, also: Writer | None = None,
    ):  # fmt: skip
        self._plan, self._bytes_per_token = plan, bytes_per_token
        self._writer = MetricsWriter(workdir, start, also) if writes else NoWriter()
        self.usage = UsageLog(workdir, plan.model, start, writes)
        log, bar = (log, bar) if writes else (lambda _: None, False)
        self._progress = RunProgress(plan.train.steps, start, log, bar)
        self._tokens = plan.train.batch_size * plan.model.max_seq_len
        self._throughput, self._losses, self._warned = Throughput(), [], set()
        self.passes = 0.0
        self.summary: dict[str, float] = costs(plan.model)
        # Compiles, so that no step has to wait for it.
        usage_metrics(jax.device_get(empty_usage(plan.model)), plan.model)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After an error the first message counts, not what closing says.
        with contextlib.suppress(*([InputError] if kind else [])):
            self.close()

    def step(self, done: Done) -> None:
        """Waits for a step's metrics; they go to the bar, and into a line where one is due.

        Raises:
          Diverged: loss, gradient or update is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        self._throughput.step(self._tokens)
        if in_a_row := values.get("in_a_row"):
            self._check_skipped(done.step, int(in_a_row), values)
        else:
            for name in ("loss", "grad_norm", "update_norm"):
                _check_finite(done.step, name, values[name])
            self._losses.append(values["loss"])
        self._progress.step(done.step, values["loss"])
        if done.usage is not None:
            self._line(done, values)

    def _check_skipped(self, step: int, in_a_row: int, values: dict[str, float]) -> None:
        """Says that a step was skipped; raises Diverged where that were too many in a row."""
        most = self._plan.optim.skip_at_most
        if in_a_row > most:
            raise Diverged(
                f"step {step}: {in_a_row} steps in a row would have been skipped, and optim.skip_at_most is "
                f"{most}; the run stops here, and the last checkpoint stays. A lower optim.lr may help."
            )
        self.say(
            f"step {step}: skipped, loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}; "
            f"{int(values['skipped'])} so far"
        )

    def _line(self, done: Done, values: dict[str, float]) -> None:
        """A line of metrics over the window since the last one; none where all its steps were skipped."""
        if not self._losses:
            self.usage.train(jax.device_get(done.usage))
            return
        line = loss_metrics(sum(self._losses) / len(self._losses))
        rate, self._losses = self._throughput.take(), []
        left = None
        if rate:
            line["tokens_per_s"] = rate
            left = (self._plan.train.steps - done.step) * self._tokens / rate
            self.summary |= {"tokens_per_s": rate, "seconds_per_step": self._tokens / rate}
        named = {name: value for name, value in values.items() if name not in ("loss", "in_a_row")}
        line |= {name: value for name, value in named.items() if math.isfinite(value)}
        self.summary |= {"skipped": values["skipped"]} if "skipped" in values else {}
        usage = jax.device_get(done.usage)
        line |= usage_metrics(usage, self._plan.model)
        self.usage.train(usage)
        self.summary["train_loss"] = line["loss"]
        self._writer.write(done.step, "train", line)
        is_warm = (
            done.step > self._plan.optim.warmup
        )  # before, nearly all leaves of a healthy tree are unvisited
        self._progress.line(done.step, line, left, usage=is_warm, more=done.note)

    def valid(self, step: int, score: Score, probed: tuple | None, write: bool = True) -> dict[str, float]:
        """Figures of a validation: written, said and returned.

        Args:
          step: finished steps.
          score: of the validation.
          probed: of `probe.probe` on its first batch, or None.
          write: False where this validation is in the files already.

        Raises:
          Diverged: the loss is not finite.
        """
        _check_finite(step, "validation loss", score.loss)
        values = loss_metrics(score.loss, self._bytes_per_token)
        values |= self.usage.valid(step, score, probed, write)
        if write:
            passes = self.passes * step / self._plan.train.steps
            self._writer.write(step, "valid", {**values, "tokens": score.tokens, "passes": passes})
        bits = f", {values['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in values else ""
        self.say(f"step {step}: validation loss {score.loss:.4f}, perplexity {values['ppl']:.2f}{bits}")
        self._warn_dead(step, values, score.tokens)
        self._throughput.pause()
        return values

    def _warn_dead(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Says once a layer that most of its leaves are dead, when that can be known.

        Not before warm-up ends: until then nearly all leaves of a healthy tree are
        unvisited. And not below 1,000 tokens a leaf, which is what dead means.
        """
        if step <= self._plan.optim.warmup:
            return
        layers = [ffn for ffn, n_layers in self._plan.model.runs for _ in range(n_layers)]
        for layer, ffn in enumerate(layers):
            dead = values.get(f"dead_leaves/{layer}", 0.0)
            n_leaves, remedy = _can_die(ffn)
            enough = n_leaves and tokens >= 1000 * n_leaves
            if enough and dead > 0.5 and layer not in self._warned:
                self._warned.add(layer)
                self.say(
                    f"step {step}: layer {layer} left {100 * dead:.0f} % of its leaves without a visit in "
                    f"{tokens:,} validation tokens; {remedy} may help"
                )

    def say(self, text: str) -> None:
        """One line for people."""
        self._progress.say(text)

    def close(self) -> None:
        """Closes files and bar."""
        try:
            self._progress.close()
        finally:
            self._writer.close()


def _can_die(ffn: FFNSpec) -> tuple[int, str]:
    """Leaves of a tree, or experts that are leaves; and what keeps them alive. 0 of other layers."""
    if isinstance(ffn, TreeSpec):
        return ffn.shape.n_leaves, "ffn.balance_rate=1e-3 or a smaller ffn.depth"
    if isinstance(ffn, LeafSpec):
        return ffn.n_experts, "a higher ffn.balance_rate or fewer ffn.n_experts"
    return 0, ""


def _check_finite(step: int, name: str, value: float) -> None:
    """Raises Diverged, which names the step, unless `value` is a finite number."""
    if not math.isfinite(value):
        raise Diverged(
            f"step {step}: {name} is {value}; the run stops here, and the last checkpoint stays. "
            "A lower optim.lr, a longer optim.warmup_steps or a smaller optim.clip_norm may help."
        )


class MetricsWriter:
    """Writes metrics.jsonl and, where the package is present, TensorBoard events.

    Args:
      workdir: directory of the run.
      step: the step at which the run starts or resumes; later lines of an
        interrupted run are dropped, so that the file has every step once.
      also: one more writer.

    Raises:
      InputError: a file cannot be written.
    """

    def __init__(self, workdir: str, step: int = 0, also: Writer | None = None):
        self._directory = os.path.join(workdir, "tensorboard")
        with contextlib.ExitStack() as opened:  # closes the first where a later one cannot be opened
            self._metrics = _Lines(os.path.join(workdir, "metrics.jsonl"), step)
            opened.callback(self._metrics.close)
            with writing(self._directory):
                self._others = [one for one in (_event_writer(self._directory, step), also) if one]
            opened.pop_all()

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends one line, and the same scalars as TensorBoard events; without metrics that are 0 / 0, NaN.

        Args:
          step: finished steps.
          split: `train` or `valid`.
          values: metrics by name.

        Raises:
          InputError: a file cannot be written.
        """
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self._metrics.write({"step": step, "split": split, **values})
        for write in self._others:
            with writing(self._directory):
                write(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flushes and closes both, one even where the other fails.

        Raises:
          InputError: a file cannot be written; closing flushes what `write` could not.
        """
        with contextlib.ExitStack() as stack:
            for write in self._others:
                stack.enter_context(writing(self._directory))
                stack.callback(write, None, {})
            self._metrics.close()


class NoWriter:
    """In place of `MetricsWriter` in a process that writes nothing."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Lines:
    """A file of JSON lines that is appended to, without the lines of steps after `step`."""

    def __init__(self, path: str, step: int):
        self._path = path
        with writing(path):
            _drop_after(path, step)
            self._file = open(path, "a", encoding="utf-8")

    def write(self, line: dict) -> None:
        with writing(self._path):
            self._file.write(json_text(line, self._path) + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


def _drop_after(path: str, step: int) -> None:
    """Removes lines of later steps, and a torn last line, from a file of JSON lines."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False
            kept += [line] if keep else []
    with replacing(path) as file:
        file.writelines(kept)


def _event_writer(directory: str, step: int):
    """Function (step, scalars) that writes TensorBoard events; None without the package."""
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError:
        return None
    os.makedirs(directory, exist_ok=True)
    # Not EventFileWriter: its thread ends on a full disk, and whoever adds events then waits for ever.
    writer = EventsWriter(os.path.join(directory, "events"), f".{os.getpid()}.{step}")

    def write(step: int | None, scalars: dict[str, float]) -> None:
        if step is None:
            writer.close()
            return
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        add(step, summary=summary_pb2.Summary(value=values))

    def add(step: int, **what) -> None:
        writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))
        writer.flush()

    # TensorBoard forgets what an interrupted run wrote after this step.
    add(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    return write
