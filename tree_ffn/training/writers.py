"""Where a run's figures go: metrics.jsonl, usage.jsonl and TensorBoard events.

metrics.jsonl   one flat JSON object a line: step, split, figures
usage.jsonl     one array of one run of layers a line, see `encode`
"""

import base64
import contextlib
import json
import math
import os
import time
import zlib

import numpy as np

from tree_ffn.json_output import json_text
from tree_ffn.paths import replacing, writing

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its classes when it is imported)


class MetricsWriter:
    """Writes metrics.jsonl, usage.jsonl and, where the package is present, TensorBoard events.

    Args:
      workdir: directory of the run.
      step: the step at which the run starts or resumes; later lines of an
        interrupted run are dropped, so that the files have every step once.

    Raises:
      InputError: a file cannot be written.
    """

    def __init__(self, workdir: str, step: int = 0):
        self._directory = os.path.join(workdir, "tensorboard")
        with contextlib.ExitStack() as opened:  # closes the first where a later one cannot be opened
            self._metrics = _Lines(os.path.join(workdir, "metrics.jsonl"), step)
            opened.callback(self._metrics.close)
            self._usage = _Lines(os.path.join(workdir, "usage.jsonl"), step)
            opened.callback(self._usage.close)
            with writing(self._directory):
                self._events = _event_writer(self._directory, step)
            opened.pop_all()

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends one line, and the same scalars as TensorBoard events; without figures that are 0 / 0, NaN.

        Raises:
          InputError: a file cannot be written.
        """
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self._metrics.write({"step": step, "split": split, **values})
        if self._events:
            with writing(self._directory):
                self._events(step, {f"{split}/{name}": value for name, value in values.items()})

    def write_arrays(self, step: int, split: str, first_layer: int, arrays: dict[str, np.ndarray]) -> None:
        """Appends arrays [layers, ...] of one run of layers to usage.jsonl, a line each.

        Raises:
          InputError: the file cannot be written.
        """
        for name, array in arrays.items():
            head = {"step": step, "split": split, "first_layer": first_layer, "name": name}
            self._usage.write(head | encode(array))

    def close(self) -> None:
        """Flushes and closes all, the others even where one fails.

        Raises:
          InputError: a file cannot be written; closing flushes what `write` could not.
        """
        with contextlib.ExitStack() as stack:
            if self._events:
                stack.enter_context(writing(self._directory))
                stack.callback(self._events, None, {})
            stack.callback(self._usage.close)
            self._metrics.close()


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


def encode(array: np.ndarray) -> dict:
    """An array as JSON values: {dtype, shape, data}, data being base64 of zlib of its little-endian bytes.

    Example:
      >>> decode(encode(np.arange(6, dtype=np.int32).reshape(2, 3))).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(array.tobytes())).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def decode(values: dict) -> np.ndarray:
    """The inverse of `encode`; other keys are ignored."""
    data = zlib.decompress(base64.b64decode(values["data"]))
    dtype = np.dtype(values["dtype"]).newbyteorder("<")
    return np.frombuffer(data, dtype).reshape(values["shape"]).astype(values["dtype"])


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
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    os.makedirs(directory, exist_ok=True)  # TensorFlow, where it is present, would raise no OSError
    writer = EventFileWriter(directory)
    # TensorBoard forgets what an interrupted run wrote after this step.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(step: int | None, scalars: dict[str, float]) -> None:
        if step is None:
            return writer.close()
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))
        )

    return write
