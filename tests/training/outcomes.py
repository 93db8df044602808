"""What faults are made of: a place with text, runs of real processes in it, and what has followed."""

import pathlib
import time
from typing import NamedTuple

import numpy as np

from tests.training.several import Several, losses
from tests.training.tiny import write_texts
from tree_ffn.training.checkpoint_files import steps_on_disk


class Outcome(NamedTuple):
    """What followed a fault: seconds until all had ended, exit codes, the last line of each process."""

    seconds: float
    codes: list[int]
    said: list[str]


class NotHere(Exception):
    """A fault that cannot be done on this machine; the message says why."""


class Place:
    """A directory with text, and names of workdirs in it that are new."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.n = directory, 0
        self.texts = directory / "texts"
        self.texts.mkdir()
        write_texts(self.texts)

    def new(self) -> pathlib.Path:
        self.n += 1
        return self.directory / f"run{self.n}"

    def run(self, n: int, *flags: str, workdir: pathlib.Path | None = None, **how) -> Several:
        return Several(n, workdir or self.new(), self.texts, *flags, **how)


def outcome(run: Several, since: float, limit: float) -> Outcome:
    """Waits for the end of all, at most `limit` seconds after the fault."""
    codes = run.wait(limit)
    return Outcome(time.monotonic() - since, codes, [lines[-1] if lines else "" for lines in run.said()])


def ended(run: Several, *codes: int) -> Outcome:
    """An end without a fault; seconds are those of the whole run."""
    found = outcome(run, run.began, 3600)
    assert tuple(found.codes) == codes, found
    return found


def checkpoints(workdir: pathlib.Path) -> list[int]:
    return steps_on_disk(str(workdir / "checkpoints"))


def same_losses(workdir, other, rtol=1e-6) -> None:
    ours, theirs = losses(workdir), losses(other)
    assert ours.keys() == theirs.keys() and ours
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=rtol)
