"""Figures of a run and where they go: metrics.jsonl, TensorBoard, the terminal.

One process writes, and one object does: `Metrics`. A line of metrics.jsonl is
one flat JSON object: step, split, loss, ppl, and so on.
"""

import json
import math
import os
import sys
import time

import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.models.ffn import MoESpec
from tree_ffn.models.transformer import ModelSpec, runs_of
from tree_ffn.tree.usage import figures


def loss_figures(loss: float, bytes_per_token: float = 0.0) -> dict[str, float]:
    """Loss in nats a token, perplexity, and bits per byte where the bytes are known.

        ppl = exp(loss),   bits_per_byte = loss / ln 2 / bytes_per_token

    Example:
      >>> loss_figures(math.log(256.0), bytes_per_token=1.0)["bits_per_byte"]
      8.0
    """
    values = {"loss": loss, "ppl": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        values["bits_per_byte"] = loss / math.log(2.0) / bytes_per_token
    return values


def usage_figures(usage, model: ModelSpec) -> dict[str, float]:
    """Flat figures of every layer that routes, keyed `dead_leaves/<layer>` and so on.

    Args:
      usage: visit counts, one a run, as `step.empty_usage`.
      model: says which layers a run holds.

    Returns:
      `dead_leaves` (share of leaves, or experts, without a visit),
      `leaf_entropy` (over its largest value) and, of trees,
      `constant_decisions` (share of decisions that always went one way).
    """
    values, first = {}, 0
    for (ffn, n_layers), counts in zip(runs_of(model), usage):
        for layer in range(n_layers if counts is not None else 0):
            one = np.asarray(counts[layer])
            found = _expert_figures(one[0]) if isinstance(ffn, MoESpec) else figures(one)
            values.update({f"{name}/{first + layer}": float(value) for name, value in found.items()})
        first += n_layers
    return values


def _expert_figures(counts_X: np.ndarray) -> dict[str, float]:
    """Dead share and entropy / log X of expert counts."""
    share = counts_X / max(counts_X.sum(), 1)
    share = share[share > 0]
    largest = math.log(len(counts_X)) or 1.0
    return {"dead_leaves": float(np.mean(counts_X == 0)), "leaf_entropy": float(-(share * np.log(share)).sum() / largest)}


class Throughput:
    """Tokens per second of training alone: compiling, validation and saving are left out.

    The clock starts when the first step has finished, and stands still in `pause`.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock, self._since, self._tokens, self._seconds = clock, None, 0, 0.0

    def step(self, tokens: int) -> None:
        """A step of `tokens` tokens has finished."""
        now = self._clock()
        if self._since is not None:
            self._seconds += now - self._since
            self._tokens += tokens
        self._since = now

    def pause(self) -> None:
        """Something else is done before the next step finishes; that step is not counted."""
        self._since = None

    def take(self) -> float | None:
        """Tokens per second since the last call; None before two steps have finished."""
        rate = self._tokens / self._seconds if self._seconds > 0 else None
        self._tokens, self._seconds = 0, 0.0
        return rate


class Metrics:
    """Writes metrics.jsonl and, where the package is present, TensorBoard events.

    Args:
      workdir: directory of the run.
      step: the step at which the run starts or resumes; later lines of an
        interrupted run are dropped, so that the file has every step once.

    Raises:
      InputError: the file cannot be written.
    """

    def __init__(self, workdir: str, step: int = 0):
        self._path = os.path.join(workdir, "metrics.jsonl")
        try:
            _drop_after(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"workdir: {self._path} cannot be written ({error.strerror}).") from error
        self._events = _event_writer(os.path.join(workdir, "tensorboard"), step)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends one line, and the same scalars as TensorBoard events."""
        line = {"step": step, "split": split, **values}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"workdir: {self._path} cannot be written ({error.strerror}).") from error
        if self._events:
            self._events(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        if self._events:
            self._events(None, {})


def _drop_after(path: str, step: int) -> None:
    """Removes lines of later steps, and a torn last line, from metrics.jsonl."""
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
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(path + ".new", path)


def _event_writer(directory: str, step: int):
    """Function (step, scalars) that writes TensorBoard events; None without the package."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    writer = EventFileWriter(directory)
    # TensorBoard forgets what an interrupted run wrote after this step.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(step: int | None, scalars: dict[str, float]) -> None:
        if step is None:
            return writer.close()
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))

    return write


class Progress:
    """A bar on a terminal, plain lines elsewhere: loss, tokens/s, time left, dead leaves.

    Args:
      steps: length of the run.
      start: finished steps when it starts or resumes.
      log: takes the plain lines.
      bar: draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, steps: int, start: int, log=print, bar: bool | None = None):
        self._steps, self._log, self._bar, self._note = steps, log, None, ""
        if sys.stderr.isatty() if bar is None else bar:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self, step: int, loss: float) -> None:
        """A step has finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}{self._note}", refresh=False)
            self._bar.update(step - self._bar.n)

    def line(self, step: int, values: dict[str, float], seconds_left: float | None) -> None:
        """Figures of a window of training steps."""
        dead = [value for name, value in values.items() if name.startswith("dead_leaves/")]
        note = f", {values['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in values else ""
        note += f", dead leaves {100 * max(dead):.0f} %" if dead else ""
        self._note = note
        if self._bar is None:
            left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
            self._log(f"step {step}/{self._steps}: loss {values['loss']:.4f}{note}{left}")

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        if self._bar is None:
            self._log(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
