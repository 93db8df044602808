"""What a long preparation tells: lines for a pipe, a bar for a terminal."""

import io
import sys

import pytest

from tree_ffn import progress as module
from tree_ffn.progress import Progress


def test_short_tasks_say_nothing():
    lines = []
    with Progress("reading", 10, "B", lines.append) as progress:
        progress.to(5)
    assert lines == []


def test_lines_now_and_then(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress("reading", 10, "B", lines.append) as progress:
        for position in range(10):
            now[0] += 4
            progress.to(position)
    assert lines == ["reading: 20 %", "reading: 50 %", "reading: 80 %"]


def test_blocks_move_it(monkeypatch):
    with Progress("writing", 6, "row", print) as progress:
        assert list(progress.along(["abc", "de"])) == ["abc", "de"] and progress.position == 5


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    lines = []
    with Progress("reading", 10, "B", lines.append) as progress:
        progress.to(10)
    assert "reading" in terminal.getvalue() and not lines
