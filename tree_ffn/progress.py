"""How far a long task is: a bar on a terminal, plain lines elsewhere; a bar needs the package tqdm."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Reports positions of one task between 0 and `total`.

    Args:
      label: what is being done.
      total: the position at the end.
      unit: of positions; `B` is shown as kB, MB and so on.
      log: takes the plain lines.

    Example:
      >>> with Progress("reading", 10, "file", print) as progress:
      ...     progress.to(10)
    """

    def __init__(self, label: str, total: int, unit: str, log: Callable[[str], None]):
        self.label, self.total, self.log = label, total, log
        self.position = 0
        self.next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        how = {"desc": label, "total": total, "unit": unit, "unit_scale": True, "leave": False}
        self.bar = _bar(**how) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def to(self, position: int) -> None:
        """The task has come to `position`."""
        self.position = position
        if self.bar is not None:
            self.bar.update(position - self.bar.n)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self.log(f"{self.label}: {100 * position // max(self.total, 1)} %")

    def along(self, blocks: Iterable[Sized]) -> Iterator:
        """The same blocks; each moves the position by its length when the next is asked for."""
        for block in blocks:
            yield block
            self.to(self.position + len(block))


class RunProgress:
    """Of a run of training: loss, tokens/s, usage of the trees, time left.

    Args:
      steps: length of the run.
      start: finished steps when it starts or resumes.
      log: takes the plain lines.
      bar: draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, steps: int, start: int, log=print, bar: bool | None = None):
        self._steps, self._log, self._note = steps, log, ""
        how = {"total": steps, "initial": start, "unit": "step", "dynamic_ncols": True, "smoothing": 0.05}
        self._bar = _bar(**how) if (sys.stderr.isatty() if bar is None else bar) else None

    def step(self, step: int, loss: float) -> None:
        """A step has finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}{self._note}", refresh=False)
            self._bar.update(step - self._bar.n)

    def line(
        self, step: int, values: dict[str, float], seconds_left: float | None, usage: bool = True,
        more: str = "",
    ) -> None:  # fmt: skip
        """Metrics of a window of training steps; `usage`: those of leaves and experts too.

        Args:
          step: finished steps.
          values: metrics by name; `loss` is there.
          seconds_left: until the last step; None: not known.
          usage: also say how leaves and experts are used.
          more: what else is to be said.
        """
        note = f", {values['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in values else ""
        self._note = note = note + (_usage(values) if usage else "") + more
        if self._bar is None:
            left = "" if seconds_left is None else f", {duration(seconds_left)} left"
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


def _usage(values: dict[str, float]) -> str:
    """The worst layer's metrics: `, dead leaves <= 25 %, entropy >= 0.71, constant <= 12 %`."""
    parts = []
    for metric, worst, text in (
        ("dead_leaves", max, "dead leaves <= {:.0%}"),
        ("leaf_entropy", min, "entropy >= {:.2f}"),
        ("constant_decisions", max, "constant <= {:.0%}"),
    ):
        layers = [value for name, value in values.items() if name.startswith(f"{metric}/")]
        parts += [f", {text.format(worst(layers))}"] if layers else []
    return "".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bar(**options):
    """A bar of tqdm; None without the package."""
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm.tqdm(**options)
