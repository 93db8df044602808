"""Where figures are written: metrics.jsonl, one flat JSON object a line, and TensorBoard events."""

import contextlib
import json
import os
import time

from tree_ffn.errors import InputError, reason

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its classes when it is imported)


class MetricsWriter:
    """Writes metrics.jsonl and, where the package is present, TensorBoard events.

    Args:
      workdir: directory of the run.
      step: the step at which the run starts or resumes; later lines of an
        interrupted run are dropped, so that the file has every step once.

    Raises:
      InputError: a file cannot be written.
    """

    def __init__(self, workdir: str, step: int = 0):
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._directory = os.path.join(workdir, "tensorboard")
        with _writing(self._path):
            _drop_after(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
        try:
            with _writing(self._directory):
                self._events = _event_writer(self._directory, step)
        except InputError:
            self._file.close()
            raise

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends one line, and the same scalars as TensorBoard events.

        Raises:
          InputError: a file cannot be written.
        """
        line = {"step": step, "split": split, **values}
        with _writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events:
            with _writing(self._directory):
                self._events(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flushes and closes both, the second even where the first fails.

        Raises:
          InputError: a file cannot be written; closing flushes what `write` could not.
        """
        with contextlib.ExitStack() as stack:
            if self._events:
                stack.enter_context(_writing(self._directory))
                stack.callback(self._events, None, {})
            with _writing(self._path):
                self._file.close()


@contextlib.contextmanager
def _writing(path: str):
    """Says in one sentence what the operating system says about `path`."""
    try:
        yield
    except OSError as error:
        said = error.strerror or reason(error)
        raise InputError(f"workdir: {path} cannot be written ({said}).") from error


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
