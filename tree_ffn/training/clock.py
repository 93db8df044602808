"""Where the time of a run goes, over all its starts, and what is due by time."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from tree_ffn.progress import duration

KINDS = ("steps", "reading", "validation", "saving", "starting", "lost")


class Clock:
    """Sums up seconds by what they were spent on, from now on.

    `reading` is waiting for text. `starting` is all before the first step is compiled. `lost` lies between
    the checkpoint with which a start goes on and that start: steps that are made again, and waiting.

    Args:
      clock: seconds that only rise.
      wall: seconds that two starts on different machines agree on.

    Example:
      >>> clock = Clock()
      >>> with clock.during("saving"):
      ...     pass
      >>> clock.seconds["saving"] < 1
      True
    """

    def __init__(self, clock=time.monotonic, wall=time.time):
        self._clock, self._wall, self._began, self._from = clock, wall, clock(), wall()
        self._kind, self._since, self._saved = "starting", self._began, self._began
        self.seconds, self.restarts = dict.fromkeys(KINDS, 0.0), 0
        self._read = 0.0, self._began

    def to(self, kind: str) -> str:
        """From here on time counts as `kind`; returns as what it did before."""
        now, before = self._clock(), self._kind
        self.seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Within, time counts as `kind`."""
        before = self.to(kind)
        try:
            yield
        finally:
            self.to(before)

    def share_of_reading(self) -> float:
        """Of the time since the last call."""
        self.to(self._kind)
        (before, then), now = self._read, self._clock()
        self._read = self.seconds["reading"], now
        return (self.seconds["reading"] - before) / max(now - then, 1e-9)

    def spent(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; from here on, time without a checkpoint counts."""
        self.to(self._kind)
        self._saved = self._clock()
        return {"seconds": dict(self.seconds), "restarts": self.restarts, "until": self._wall()}

    def goes_on(self, spent: dict[str, Any] | None) -> None:
        """Adds what a checkpoint kept, if it did; a wall clock that went back has lost nothing."""
        if spent is None:  # it began elsewhere, or before this was kept
            return
        for kind, seconds in spent["seconds"].items():
            self.seconds[kind] += seconds
        self.seconds["lost"] += max(0.0, self._from - spent["until"])
        self.restarts = spent["restarts"] + 1
        self._read = self.seconds["reading"], self._clock()

    def saves(self, minutes: float) -> bool:
        """Whether there was no checkpoint for so many minutes; 0: never."""
        return 0 < minutes <= (self._clock() - self._saved) / 60

    def is_over(self, hours: float) -> bool:
        """Whether this start is so many hours ago; 0: never."""
        return 0 < hours <= (self._clock() - self._began) / 3600

    def __str__(self) -> str:
        """`0:41 in all: 80 % steps, 20 % starting`."""
        self.to(self._kind)
        total = sum(self.seconds.values())
        shares = {kind: round(100 * seconds / total) for kind, seconds in self.seconds.items()}
        said = ", ".join(f"{share} % {kind}" for kind, share in shares.items() if share)
        again = f" (restarts: {self.restarts})" if self.restarts else ""
        return f"{duration(total)} in all{again}: {said}"
