"""Why a run of a sweep ended, in one sentence."""

import types
from typing import Any, cast

from experiments.sweeps import runners


def test_a_process_that_was_killed_is_said_to_be(tmp_path):
    """The last line of its log is not why it ended."""
    run = types.SimpleNamespace(workdir=str(tmp_path), results=str(tmp_path / "r.jsonl"))
    log = tmp_path / runners.LOG
    error = lambda code: runners.ProcessRunner(True, 1, [])._error(cast(Any, run), code)
    log.write_text("step 20: loss 3.5\n\n")
    assert error(-9) == f"killed by signal 9 after: step 20: loss 3.5 ({log})"
    log.write_text("train.py: data.files: 'x' matches no file.\n")
    assert error(2) == f"data.files: 'x' matches no file. ({log})"
    log.write_text("\n")
    assert error(1) == f"no output, exit code 1 ({log})"
