"""What follows when something fails in a run of several real processes, by doing it.

    python -m tests.training.faults                                          # all, with 20 kills; no rows
    python -m tests.training.faults --only=kills_while_saving --kills=100 --results=results/faults.jsonl

Every function of FAULTS starts processes on CPU devices of this machine, hurts them, and asserts what has to
follow. A row has the seconds from the fault (or the start, where nothing is hurt) to the end of the last
process, exit codes, and what was said last.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time

import numpy as np

from experiments.common.provenance import public_command
from experiments.reporting.record import append_result
from tests.training import faults_of_one
from tests.training.outcomes import NotHere, Outcome, Place, checkpoints, ended, outcome, same_losses
from tests.training.several import HEARTBEAT, losses

LONG = ("--config.train.steps=100000",)
OFTEN = ("--config.train.checkpoint_every=4", "--config.train.eval_every=4", "--config.train.eval_batches=1")
LOST, STOPPED, REFUSED = -signal.SIGABRT, 128 + signal.SIGTERM, 2


def straight(place: Place) -> Outcome:
    """1, 2 and 4 processes, four devices in all: the losses of 20 steps are equal to 1e-6."""
    runs = [place.run(n, "--config.train.steps=20", devices=4 // n) for n in (1,)]
    found = ended(runs[0], 0)
    for n in (2, 4):
        run = place.run(n, "--config.train.steps=20", devices=4 // n)
        found = ended(run, *[0] * n)
        same_losses(run.workdir, runs[0].workdir)
    return found


def restored_elsewhere(place: Place) -> Outcome:
    """A checkpoint of 2 processes goes on in 1 and in 4, one of 4 in 2, on another mesh: losses are equal."""
    found = Outcome(0, [], [])
    for n, others in ((2, (1, 4)), (4, (2,))):
        whole = place.run(n, "--config.train.steps=12", "--config.train.keep=9", devices=4 // n)
        ended(whole, *[0] * n)
        for other in others:
            workdir = place.new()
            shutil.copytree(whole.workdir, workdir)
            for step in checkpoints(workdir)[1:]:
                shutil.rmtree(workdir / "checkpoints" / str(step))
            mesh = ("--config.mesh.data=2", "--config.mesh.model=2")
            run = place.run(
                other, "--config.train.steps=12", "--config.train.keep=9", *mesh, workdir=workdir,
                devices=4 // other,
            )  # fmt: skip
            found = ended(run, *[0] * other)
            assert "resumed at step 3 of 12" in "\n".join(run.said()[0])
            # A window of metrics that began before the stop is shorter in the resumed run.
            ours, theirs = (losses(run.workdir), losses(whole.workdir))
            valid = [key for key in theirs if key[0] == "valid"]
            np.testing.assert_allclose([ours[k] for k in valid], [theirs[k] for k in valid], rtol=2e-6)
    return found


def _told(place: Place, n: int, process: int, signum: int) -> Outcome:
    run = place.run(n, *LONG, *OFTEN)
    run.until(lambda: run.steps() >= 8)
    found = outcome(run, run.send(process, signum), 30)
    assert found.codes == [STOPPED] * n, (found, run.said())
    steps = {re.search(r"stopped by SIGTERM after step (\d+)", line)[1] for line in found.said}
    assert steps == {str(checkpoints(run.workdir)[-1])}, (steps, checkpoints(run.workdir))
    return found


def sigterm_to_the_first(place: Place) -> Outcome:
    """SIGTERM to process 0 of 2: both save after the same step and end with 143."""
    return _told(place, 2, 0, signal.SIGTERM)


def sigterm_to_another(place: Place) -> Outcome:
    """SIGTERM to process 3 of 4: all save after the same step and end with 143."""
    return _told(place, 4, 3, signal.SIGTERM)


def sigusr1_to_another(place: Place) -> Outcome:
    """SIGUSR1 to process 1 of 2: both save after the same step and end with 143."""
    return _told(place, 2, 1, signal.SIGUSR1)


def sigterm_before_the_first_step(place: Place) -> Outcome:
    """SIGTERM to process 1 of 2 while the step is compiled: both save after step 1 and end with 143."""
    run = place.run(2, *LONG)
    run.until(lambda: any("compiling" in line for line in run.said()[0]))
    found = outcome(run, run.send(1, signal.SIGTERM), 60)
    assert found.codes == [STOPPED] * 2 and checkpoints(run.workdir), (found, run.said())
    return found


def _lost(place: Place, n: int, process: int, signum: int) -> Outcome:
    run = place.run(n, *LONG, *OFTEN)
    run.until(lambda: len(checkpoints(run.workdir)) > 1)
    since, known = run.send(process, signum), checkpoints(run.workdir)
    others = [one for i, one in enumerate(run.processes) if i != process]
    for one in others:
        with contextlib.suppress(Exception):
            one.wait(HEARTBEAT + 5 - (time.monotonic() - since))
    seconds = time.monotonic() - since
    run.processes[process].kill()
    found = outcome(run, since, 10)._replace(seconds=seconds)
    said = rf"train.py: process {process} of this run was lost; its last whole checkpoint stays: .*"
    for i, lines in enumerate(run.said()):
        if i != process:
            assert found.codes[i] == LOST and re.fullmatch(said, lines[-1]), (found, lines)
            assert not any("Traceback" in line or "Check failure" in line for line in lines), lines
    assert checkpoints(run.workdir)[-1] >= known[-1]
    return found


def kill_of_the_first(place: Place) -> Outcome:
    """kill -9 of process 0 of 2: the other ends within the heartbeat of 5 s + 5 s, with one sentence."""
    return _lost(place, 2, 0, signal.SIGKILL)


def kill_of_another(place: Place) -> Outcome:
    """kill -9 of process 1 of 2: the other ends within the heartbeat of 5 s + 5 s, with one sentence."""
    return _lost(place, 2, 1, signal.SIGKILL)


def kill_of_one_of_four(place: Place) -> Outcome:
    """kill -9 of process 2 of 4: the others end within the heartbeat of 5 s + 5 s, with one sentence."""
    return _lost(place, 4, 2, signal.SIGKILL)


def a_process_that_hangs(place: Place) -> Outcome:
    """SIGSTOP to process 1 of 2: the other ends within the heartbeat of 5 s + 5 s, with one sentence."""
    return _lost(place, 2, 1, signal.SIGSTOP)


def _refused(place: Place, said: str, flags: list[str], variables: dict[str, str]) -> Outcome:
    run = place.run(2, of_one=(1, flags, variables))
    found = outcome(run, run.began, 60)
    assert found.codes == [REFUSED] * 2, (found, run.said())
    for lines in run.said():
        assert len([line for line in lines if line.startswith("train.py:")]) == 1
        assert re.search(said, lines[-1]) and not any("Traceback" in line for line in lines), lines
    assert not losses(run.workdir) and not checkpoints(run.workdir)
    return found


def another_config(place: Place) -> Outcome:
    """Process 1 of 2 has another learning rate: refused, the process and the key named."""
    return _refused(place, r"process 1: config\.optim\.lr is 0\.5", ["--config.optim.lr=0.5"], {})


def another_text(place: Place) -> Outcome:
    """Process 1 of 2 finds other text at its path: refused, the process and the sha256 named."""
    other = place.directory / "other"
    shutil.copytree(place.texts, other, dirs_exist_ok=True)
    (other / "0.txt").write_text("another text " * 300)
    files = f"--config.data.files={other}/*.txt"
    return _refused(place, r"process 1: .*data\.sha256 is '", [files], {})


def another_commit(place: Place) -> Outcome:
    """Process 1 of 2 runs other code: refused, the process and the commit named."""
    return _refused(place, r"process 1: code\.commit is 'fffff", [], {"TREE_FFN_COMMIT": "fffff"})


def a_workdir_of_its_own(place: Place) -> Outcome:
    """Process 1 of 2 sees another directory as its workdir: refused, the process named."""
    own = place.new()
    own.mkdir()
    return _refused(place, "process 1: workdir: .* is not the directory", [f"--workdir={own}"], {})


def input_that_one_refuses(place: Place) -> Outcome:
    """Process 1 of 2 is given a value that is not allowed: all end with its sentence."""
    return _refused(place, r"process 1: model\.width: 32 is not", ["--config.model.n_heads=3"], {})


def a_process_without_devices(place: Place) -> Outcome:
    """A mesh of one device for 2 processes: refused, the process named."""
    run = place.run(2, "--config.mesh.data=1")
    found = outcome(run, run.began, 60)
    assert found.codes == [REFUSED] * 2 and "leaves process 1 without work" in found.said[0], found
    return found


def a_process_that_does_not_come(place: Place) -> Outcome:
    """Two processes are announced and one is started: it ends after JAX's 300 s, with one sentence."""
    run = place.run(1, of_one=(0, [], {"JAX_NUM_PROCESSES": "2"}))
    found = outcome(run, run.began, 420)
    (said,) = (line for line in run.said()[0] if line.startswith("train.py:"))
    assert found.codes == [LOST] and "some processes of this run did not come in time" in said, found
    assert not run.workdir.exists()
    return found


def _damaged(place: Place, damage, n: int = 2) -> Outcome:
    whole = place.run(2, devices=2)
    ended(whole, 0, 0)
    workdir = place.new()
    shutil.copytree(whole.workdir, workdir)
    damage(workdir / "checkpoints" / "6")
    run = place.run(n, workdir=workdir, devices=4 // n)
    found = ended(run, *[0] * n)
    line = next(line for line in run.said()[0] if line.startswith("checkpoint:"))
    assert "checkpoints/6 cannot be read; it is now 6.damaged, and step 3 is used" in line
    assert checkpoints(workdir) == [3, 6] and (workdir / "checkpoints" / "6.damaged").is_dir()
    key = ("valid", 6)
    np.testing.assert_allclose(losses(workdir)[key], losses(whole.workdir)[key], rtol=1e-6)
    return found._replace(said=[line, *found.said[1:]])


def a_torn_newest_checkpoint(place: Place) -> Outcome:
    """Half of what process 1 saved is missing: the checkpoint is named, the one before is used."""

    def damage(path):
        for part in (path / "model" / "ocdbt.process_1" / "d").iterdir():
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])

    return _damaged(place, damage)


def a_newest_checkpoint_without_a_part(place: Place) -> Outcome:
    """The item of the optimizer is gone: the checkpoint is named, the one before is used."""
    return _damaged(place, lambda path: shutil.rmtree(path / "optimizer"))


def an_empty_newest_checkpoint(place: Place) -> Outcome:
    """Nothing but its directory is there: it is named, the one before is used, by one process."""

    def damage(path):
        shutil.rmtree(path)
        path.mkdir()

    return _damaged(place, damage, n=1)


def is_newer(workdir: pathlib.Path, before: list[int]) -> bool:
    """Whether there is a checkpoint that was not there before."""
    return checkpoints(workdir)[-1:] > before[-1:]


def unfinished(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, or was when all ended."""
    return any(not name.isdecimal() for name in os.listdir(workdir / "checkpoints"))


def kills_while_saving(place: Place, kills: int = 20, steps: int = 160) -> Outcome:
    """kill -9 of a random process of 2, or of both, while checkpoints are written, again and again.

    Whole checkpoints stay, none is half there, and every resume ends up with the losses of the straight run.
    """
    flags = (f"--config.train.steps={steps}", *OFTEN)
    whole = place.run(2, *flags)
    ended(whole, 0, 0)
    want = {key: loss for key, loss in losses(whole.workdir).items() if key[0] == "valid"}
    chance, workdir, began, done, half, lines = random.Random(0), place.new(), time.monotonic(), 0, 0, []
    while done < kills:
        before = checkpoints(workdir)
        run = place.run(2, *flags, workdir=workdir)
        with contextlib.suppress(AssertionError):  # it has come to its end
            run.until(functools.partial(is_newer, workdir, before))
            if done % 2:  # at once within a save, else anywhere in a save or between two
                run.until(functools.partial(unfinished, workdir))
            time.sleep(chance.uniform(0, 0.1 if done % 2 else 0.5))
        victim = chance.choice((0, 1, None))
        known = checkpoints(workdir)
        for process in (0, 1) if victim is None else (victim,):
            run.send(process)
        codes = run.wait(HEARTBEAT + 5)
        finished = codes == [0, 0]
        done += not finished
        half += unfinished(workdir) and not finished
        assert finished or -signal.SIGKILL in codes, (codes, run.said())
        assert checkpoints(workdir)[-1:] >= known[-1:], "a whole checkpoint was lost"
        resumed = [line for line in run.said()[0] if line.startswith("resumed at step")]
        assert not before or resumed == [f"resumed at step {before[-1]} of {steps}"], (before, run.said())
        got = {key: loss for key, loss in losses(workdir).items() if key[0] == "valid"}
        assert got.items() <= want.items(), (len(got), "a loss is not the straight run's")
        lines.append(f"kill {done}: {codes}, step {checkpoints(workdir)[-1:]}")
        print(lines[-1], flush=True)
        if finished:
            assert got == want
            workdir = place.new()
    said = f"{done} kills, after {half} of them a checkpoint was left unfinished and was not taken for one"
    return Outcome(time.monotonic() - began, codes, [said])


FAULTS = [
    straight, restored_elsewhere, sigterm_to_the_first, sigterm_to_another, sigusr1_to_another,
    sigterm_before_the_first_step, kill_of_the_first, kill_of_another, kill_of_one_of_four,
    a_process_that_hangs, another_config, another_text, another_commit, a_workdir_of_its_own,
    input_that_one_refuses, a_process_without_devices, a_process_that_does_not_come,
    a_torn_newest_checkpoint, a_newest_checkpoint_without_a_part, an_empty_newest_checkpoint,
    *faults_of_one.FAULTS, kills_while_saving,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="names of faults, joined by commas")
    parser.add_argument("--kills", type=int, default=20, help="of kills_while_saving")
    parser.add_argument("--results", help="file to append rows to, e.g. results/faults.jsonl")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [fault.__name__ for fault in FAULTS]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{directory}/compiled"  # most of the time would be theirs
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        place = Place(pathlib.Path(directory))
        for fault in FAULTS:
            if fault.__name__ not in names:
                continue
            more = {"kills": args.kills} if fault is kills_while_saving else {}
            try:
                found = fault(place, **more)
            except NotHere as reason:
                print(f"{fault.__name__}: left out, {reason}", flush=True)
                continue
            said = [line.replace(directory, "PATH") for line in found.said]
            print(f"{fault.__name__}: {found.codes} in {found.seconds:.1f} s; {said[0]}", flush=True)
            if args.results:
                what = (fault.__doc__ or "").split("\n")[0]
                config = {"fault": {"what": what, "exit_codes": found.codes, "said": said, **more}}
                command = public_command().replace("experiments.faults", "tests.training.faults", 1)
                append_result(
                    args.results, table="faults", row=fault.__name__, metric="seconds", value=found.seconds,
                    unit="s", seed=None, config=config, command=command,
                )  # fmt: skip


if __name__ == "__main__":
    main()
