"""Trains all rows of a table: a grid or list of configs times seeds, with tuned learning rates.

    python -m experiments.ablate --sweep=configs/sweeps/t4_cpu.py --results=runs/t4.jsonl --workdir=runs/t4
    python -m experiments.ablate --sweep=configs/sweeps/t1_small.py --results=results/t1_small.jsonl \\
        --workdir=runs/t1 --set=data.files='TEXT/*.txt.xz' --tune --gpus=0,1,2,3
    python -m experiments.ablate ... --dry       # what would run
    python -m experiments.ablate ... --print     # one command a run, for a cluster
    python -m experiments.ablate ... --launch='slurm --topology=1x8'     # a job a run (experiments.launch)

The same command goes on with a sweep: what is in --results with the same config, text and seed is not run
again, and an interrupted run goes on from its checkpoint. A run that fails is reported at the end; the
others go on, and the exit code is 1. With --tune every kind of row tries the same grid of learning rates,
which grows where the best stands at its edge. Those runs are recorded beside the results, in
*_tuning.jsonl. experiments/sweeps/sweep.py says what a sweep file may hold.
"""

import re
import signal
import sys
from collections.abc import Callable

from absl import flags

from experiments.common import cli, path_flags
from experiments.common.processes import stopped
from experiments.launching import options
from experiments.reporting import texts
from experiments.sweeps.runners import SWEEP, ProcessRunner, Runner
from experiments.sweeps.sweep import Sweep, load_sweep
from experiments.sweeps.sweep_runs import Ablation, Run, tuning_path
from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.locks import only_writer
from tree_ffn.training.plan import many_passes

_SWEEP = path_flags.define("sweep", None, "The sweep file, e.g. configs/sweeps/t4_cpu.py.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")
_WORKDIR = path_flags.define("workdir", None, "Directory of the runs, one each.")
_SET = flags.DEFINE_multi_string(
    "set", [], "A value of all rows: --set=data.files=TEXT/*.txt; may be repeated."
)
_TEXTS = flags.DEFINE_list("texts", [], texts.HELP)
_ROWS = flags.DEFINE_string("rows", "", "Only rows whose name this regular expression finds.")
_TUNE = flags.DEFINE_bool("tune", False, "Run the sweep's grid of learning rates before the rows.")
_DRY = flags.DEFINE_bool("dry", False, "Say what would run; train nothing.")
_PRINT = flags.DEFINE_bool("print", False, "Print a command for each run; train nothing.")
_LAUNCH = flags.DEFINE_string(
    "launch", "", "Start each run as a job: the words after `launch`, without config and workdir."
)
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "Runs as processes, so many at a time; 0: one by one in this process."
)
_GPUS = flags.DEFINE_list("gpus", [], "GPUs for --jobs to take in turns, e.g. 0,1; alone: a job each.")
_KEEP_RUNS = flags.DEFINE_bool("keep_runs", True, "Keep the checkpoints of finished runs.")


def main() -> None:
    check_flags()
    sweep = load_sweep(_SWEEP.value, common_values())
    if _TUNE.value and sweep.grid is None:
        raise InputError(f"--tune: {_SWEEP.value} has no tuning; name values to try there, or leave it out.")
    texts.parse(_TEXTS.value)
    ablation = Ablation(sweep, wanted_rows(sweep), _WORKDIR.value, _RESULTS.value, _TEXTS.value)
    runner = make_runner()
    if _DRY.value:
        print(ablation.outlook(_TUNE.value))
        return
    if _PRINT.value or _LAUNCH.value:
        hand_over(ablation)
        return
    try:
        with only_writer(_WORKDIR.value, "--workdir"):
            if _TUNE.value:
                tune(ablation, runner)
            make_rows(ablation, runner)
    except KeyboardInterrupt:
        raise stopped(signal.SIGINT, SWEEP) from None
    if runner.failed:
        print(f"\n{len(runner.failed)} of the runs failed:", file=sys.stderr)
        for label, said in runner.failed.items():
            print(f"  {label}: {said}", file=sys.stderr)
        sys.exit(1)
    print("all rows are done.")


def check_flags() -> None:
    """Raises InputError for flags that are missing or do not go together."""
    for flag, example in (
        (_SWEEP, "configs/sweeps/t4_cpu.py"),
        (_RESULTS, "runs/t4.jsonl"),
        (_WORKDIR, "runs/t4"),
    ):
        if not flag.value:
            raise InputError(f"--{flag.name} is missing; name one, e.g. --{flag.name}={example}.")
    if _JOBS.value < 0:
        raise InputError(f"--jobs: {_JOBS.value} is not allowed; use at least 0.")
    if any(not is_whole_number(gpu) for gpu in _GPUS.value):
        raise InputError(f"--gpus: {','.join(_GPUS.value)!r} is not allowed; use numbers such as 0,1.")
    if tuning_path(_RESULTS.value) == _RESULTS.value:
        raise InputError(
            f"--results: {_RESULTS.value!r} is not allowed; a name that ends in _tuning is of the runs that "
            "choose learning rates."
        )


def common_values() -> dict[str, str]:
    """The values of --set."""
    common: dict[str, str] = {}
    for item in _SET.value:
        key, equals, value = item.partition("=")
        if not equals or key in common:
            raise InputError(f"--set: {item!r} is not allowed; use KEY=VALUE, each key once.")
        common[key] = value
    return common


def wanted_rows(sweep: Sweep) -> Callable[[str], bool]:
    """Whether --rows finds a name."""
    try:
        pattern = re.compile(_ROWS.value)
    except re.error as error:
        raise InputError(f"--rows: {_ROWS.value!r} is no regular expression ({error}).") from error
    names = [row.name for row in sweep.rows]
    if not any(map(pattern.search, names)):
        raise InputError(f"--rows: {_ROWS.value!r} finds none of: {', '.join(names)}.")
    return lambda name: pattern.search(name) is not None


def make_runner() -> Runner:
    jobs = _JOBS.value or len(_GPUS.value)
    return ProcessRunner(_KEEP_RUNS.value, jobs, _GPUS.value) if jobs else Runner(_KEEP_RUNS.value)


def tune(ablation: Ablation, runner: Runner) -> None:
    """Runs the grid of every kind, and its extensions, round by round."""
    while todo := ablation.tuning_left():
        prepare(todo)
        print(f"{len(todo)} runs to choose learning rates by")
        runner.make(todo)
        for run in todo:
            if run.label in runner.failed and ablation.note_failure(run, runner.failed[run.label]):
                del runner.failed[run.label]
    for kind, why in ablation.broken.items():
        runner.failed[f"rows of {kind}"] = f"not run, since {why}"


def make_rows(ablation: Ablation, runner: Runner) -> None:
    """Runs what is left of the rows."""
    runs, lines = ablation.row_runs()
    left = ablation.left(runs)
    done = f"{len(runs)} runs, {len(runs) - len(left)} of them are done or cannot be run"
    print("\n".join([*lines, done]))
    prepare(left)
    runner.make(left)


def prepare(runs: list[Run]) -> None:
    """The text of all runs, once; one that is not there stops the sweep before its first step.

    Says how often it is read, where that is often.
    """
    passes = max((run.passes() for run in runs), default=0.0)
    if said := many_passes(passes):
        print(said, flush=True)


def hand_over(ablation: Ablation) -> None:
    """Prints a command a run, or starts jobs; those of the grid first, rows when their rate is known."""
    todo = ablation.tuning_left() if _TUNE.value else []
    runs = todo or ablation.left(ablation.row_runs()[0])
    if _LAUNCH.value:
        place, own = options.parse(_LAUNCH.value)
        jobs = [options.make_job(place, own, run.program, run.arguments(), run.config) for run in runs]
        options.start(place, jobs, dry_run=own.dry_run or _PRINT.value)
    else:
        for run in runs:
            print(run.command())
    if todo:
        print("# These choose learning rates; when they are done, the same command goes on with the next.")


if __name__ == "__main__":
    cli.run(main, prints=lambda: _DRY.value or _PRINT.value)
