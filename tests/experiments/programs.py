"""Runs a program of experiments/ in this process, as if from a command line."""

import contextlib
import importlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from experiments.common import cli
from experiments.reporting.command_reference import without_flags


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def call(program: str, *arguments: str) -> Outcome:
    """Exit code and output of `python -m experiments.<program> <arguments>`."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alone(program):
        with mock.patch.object(sys, "argv", [f"experiments/{program}.py", *arguments]):
            main = importlib.import_module(f"experiments.{program}").main
            try:
                cli.run(main)
            except SystemExit as exit:
                code = exit.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def alone(program: str):
    """No flags of programs, and this one not imported. Afterwards all is as it was."""
    name = f"experiments.{program}"
    module = sys.modules.pop(name, None)
    try:
        with without_flags():
            yield
    finally:
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module
