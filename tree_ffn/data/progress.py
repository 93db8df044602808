"""How far a long preparation is: a bar on a terminal, plain lines elsewhere."""

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
        self.bar = _bar(label, total, unit) if sys.stderr.isatty() else None

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


def _bar(label: str, total: int, unit: str):
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm.tqdm(desc=label, total=total, unit=unit, unit_scale=True, leave=False)
