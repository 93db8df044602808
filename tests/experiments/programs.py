"""Runs a program of experiments/ in this process, as if from a command line."""

import contextlib
import importlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from absl import flags

from experiments.common import cli


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
    """No flags of other programs: they share names. Afterwards all is as it was."""
    registry = flags.FLAGS._flags()
    before, module = dict(registry), sys.modules.pop(f"experiments.{program}", None)
    module_of = lambda name: flags.FLAGS.find_module_defining_flag(name) or ""
    for name in before:
        if module_of(name).startswith("experiments."):
            del registry[name]
    try:
        yield
    finally:
        # array_record and grain, first imported by a program, stay imported and look for their flags.
        stay = ("array_record", "grain")
        kept = {name: flag for name, flag in registry.items() if module_of(name).startswith(stay)}
        registry.clear()
        registry.update(before | kept)
        sys.modules.pop(f"experiments.{program}", None)
        if module:
            sys.modules[f"experiments.{program}"] = module
