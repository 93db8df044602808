"""What follows when something fails around a run: its disk, bucket, clock, text, or its own numbers."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np

from tests.training.emulator import PACKAGES, Bucket, is_installed
from tests.training.outcomes import NotHere, Outcome, Place, checkpoints, ended, outcome, same_losses
from tests.training.several import Several, losses

LONG = ("--config.train.steps=100000", "--config.train.eval_batches=1")
STOPPED, REFUSED, FAILED = 128 + signal.SIGTERM, 2, 1


def _one_sentence(run: Several, pattern: str) -> str:
    """The last line, which matches, and is no traceback's."""
    lines = run.said()[0]
    assert re.search(pattern, lines[-1]) and not any("Traceback" in line for line in lines), lines[-30:]
    return lines[-1]


def _told(place: Place, happens, *flags: str) -> Outcome:
    run = place.run(1, *LONG, *flags)
    run.until(functools.partial(happens, run))
    found = outcome(run, run.send(0, signal.SIGTERM), 60)
    step = re.search(r"stopped by SIGTERM after step (\d+)", found.said[0])
    assert found.codes == [STOPPED] and int(step[1]) == checkpoints(run.workdir)[-1], (found, run.said())
    return found


def sigterm_in_a_save(place: Place) -> Outcome:
    """SIGTERM while a checkpoint is written: it is finished, one more is saved, 143."""

    def saving(run):
        directory = run.workdir / "checkpoints"
        return directory.is_dir() and any("tmp" in name for name in os.listdir(directory))

    return _told(place, saving, "--config.train.checkpoint_every=1")


def sigterm_in_a_validation(place: Place) -> Outcome:
    """SIGTERM while a validation goes on: it comes to its end, the run saves after the next step, 143."""
    flags = (
        "--config.data.valid_share=0.9",
        "--config.train.eval_every=2",
        "--config.train.checkpoint_every=0",
    )
    scored = lambda run: any("step 2: validation loss" in line for line in run.said()[0])
    run = place.run(1, *LONG, *flags)
    run.until(lambda: run.steps() == 2)
    assert not scored(run)
    found = outcome(run, run.send(0, signal.SIGTERM), 60)
    assert found.codes == [STOPPED] and scored(run), (found, run.said())
    assert "stopped by SIGTERM after step 3" in found.said[0] and checkpoints(run.workdir) == [3]
    return found


@contextlib.contextmanager
def _disk(place: Place, megabytes: int):
    """A disk of its own, at a new path."""
    path = place.new()
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True
    )
    if made.returncode:
        raise NotHere("only root may mount a disk")
    try:
        yield path
    finally:
        while os.path.ismount(path):
            subprocess.run(["umount", "-l", path], check=True)


def a_full_disk(place: Place) -> Outcome:
    """A disk of 3 MB gets full: one sentence, 2; with room again the same command goes on."""
    with _disk(place, 3) as disk:
        flags = ("--config.train.steps=60", "--config.train.keep=99", "--config.train.keep_every=3")
        run = place.run(1, *flags, workdir=disk / "run")
        found = outcome(run, run.began, 200)
        assert found.codes == [REFUSED], (found, run.said())
        _one_sentence(run, r"cannot be written \(No space left on device\)")
        known = checkpoints(run.workdir)
        subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
        again = place.run(1, *flags, workdir=run.workdir)
        ended(again, 0)
        assert not known or f"resumed at step {known[-1]} of 60" in again.said()[0], (known, again.said())
        return found


def a_read_only_disk(place: Place) -> Outcome:
    """A disk turns read-only while the run goes on: one sentence, 2."""
    with _disk(place, 99) as disk:
        run = place.run(1, *LONG, workdir=disk / "run")
        run.until(lambda: checkpoints(run.workdir))
        # A mount above the same disk: files that are open may still be written, no other is.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        found = outcome(run, time.monotonic(), 60)
        assert found.codes == [REFUSED], (found, run.said())
        _one_sentence(run, "cannot be written")
        return found


def a_loss_that_is_no_number(place: Place) -> Outcome:
    """Weights become NaN: the run ends with 1 and names the step; no checkpoint has them."""
    run = place.run(1, "--config.optim.lr=1e30", "--config.optim.clip_norm=0.0", *LONG)
    found = outcome(run, run.began, 120)
    assert found.codes == [FAILED], (found, run.said())
    step = re.search(r"step (\d+): \w+ is (nan|inf)", _one_sentence(run, "the last checkpoint stays"))
    assert step and not [saved for saved in checkpoints(run.workdir) if saved >= int(step[1])]
    return found


def clocks_that_differ(place: Place) -> Outcome:
    """A run begins on a machine whose clock is a day ahead; another goes on with it: losses are equal."""
    if not shutil.which("faketime"):
        raise NotHere("faketime is not installed")
    whole = place.run(1, "--config.train.steps=12")
    ended(whole, 0)
    run = place.run(
        1, "--config.train.steps=12", "--config.train.max_hours=1e-9", before=("faketime", "-f", "+1d")
    )
    ended(run, STOPPED)
    again = place.run(1, "--config.train.steps=12", workdir=run.workdir)
    found = ended(again, 0)
    valid = lambda of: {key: loss for key, loss in losses(of.workdir).items() if key[0] == "valid"}
    assert valid(again) == valid(whole) and "(restarts: 1)" in again.said()[0][-1], again.said()
    return found


def stale_variables(place: Place) -> Outcome:
    """MEGASCALE variables of a job that is over are there: the run does not wait for its hosts."""
    stale = {
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080",
        "MEGASCALE_NUM_SLICES": "4",
        "MEGASCALE_SLICE_ID": "3",
    }
    run = place.run(2, variables=stale)
    return ended(run, 0, 0)


def a_damaged_cache_of_text(place: Place) -> Outcome:
    """Prepared rows are cut in half: they are made again, or refused with one sentence."""
    texts = place.directory / "cut"
    shutil.copytree(place.texts, texts)
    shutil.rmtree(texts / "cache", ignore_errors=True)
    flags = (f"--config.data.files={texts}/*.txt", f"--config.data.cache_dir={texts}/cache")
    whole = place.run(1, *flags)
    ended(whole, 0)
    for path in (texts / "cache").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = place.run(1, *flags)
    found = outcome(run, run.began, 120)
    if found.codes == [0]:
        same_losses(run.workdir, whole.workdir)
    else:
        assert found.codes == [REFUSED], (found, run.said())
        _one_sentence(run, "cache")
    return found


def foreign_files(place: Place) -> Outcome:
    """metrics.jsonl ends in half a line: it is dropped. config.json is a list: refused."""
    whole = place.run(1)
    ended(whole, 0)
    with open(whole.workdir / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1')
    again = place.run(1, workdir=whole.workdir)
    ended(again, 0)
    (whole.workdir / "config.json").write_text("[]")
    refused = place.run(1, workdir=whole.workdir)
    found = ended(refused, REFUSED)
    _one_sentence(refused, r"workdir: .*config\.json holds no JSON object")
    return found


@contextlib.contextmanager
def _bucket(place: Place):
    if not is_installed():
        raise NotHere(f"needs the packages {' and '.join(PACKAGES)}")
    with Bucket(place.new()) as bucket:
        yield bucket


def _in(bucket: Bucket, place: Place, n: int, name: str, *flags: str, **how) -> Several:
    return place.run(n, *flags, f"--workdir={bucket.url(name)}", variables=bucket.variables, **how)


def kills_in_a_bucket(place: Place) -> Outcome:
    """kill -9 in a save to a bucket, of 1 process and of one of 2; 2 and then 1 go on: losses are equal."""
    steps = ("--config.train.steps=30", "--config.train.eval_batches=1")
    whole = place.run(1, *steps, devices=2)
    ended(whole, 0)
    want = {key: loss for key, loss in losses(whole.workdir).items() if key[0] == "valid"}

    def saving(bucket):
        begun = [path for path in bucket.files("run").glob("checkpoints/*") if any(path.rglob("*.ocdbt"))]
        return len(begun) > len(bucket.steps("run"))

    with _bucket(place) as bucket:
        known: list[int] = []
        for n in (1, 2):
            run = _in(bucket, place, n, "run", *steps, devices=2 // n)
            run.until(lambda before=known: bucket.steps("run")[-1:] > before[-1:])
            run.until(functools.partial(saving, bucket))
            run.send(n - 1)
            codes = run.wait(30)
            assert codes[n - 1] == -signal.SIGKILL, (codes, run.said())
            resumed = [line for line in run.said()[0] if line.startswith("resumed at step")]
            assert not known or resumed == [f"resumed at step {known[-1]} of 30"], run.said()
            known = bucket.steps("run")
        run = _in(bucket, place, 1, "run", *steps, devices=2)
        found = ended(run, 0)
        assert f"resumed at step {known[-1]} of 30" in run.said()[0]
        got = {key: loss for key, loss in losses(bucket.files("run")).items() if key[0] == "valid"}
        assert got.keys() == want.keys()
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)
    return found


def a_bucket_that_comes_back(place: Place) -> Outcome:
    """The bucket does not answer for 20 s, from a save on: requests are made again, the run goes on."""
    with _bucket(place) as bucket:
        run = _in(bucket, place, 1, "run", "--config.train.steps=60")
        run.until(lambda: bucket.steps("run"))
        bucket.stop()
        since = time.monotonic()
        time.sleep(20)
        assert run.processes[0].poll() is None, run.said()
        bucket.start()
        found = outcome(run, since, 200)
        assert found.codes == [0] and bucket.steps("run")[-1] == 60, (found, run.said())
        assert not any("Traceback" in line for line in run.said()[0])
    return found


def a_bucket_that_stays_away(place: Place) -> Outcome:
    """The bucket does not answer any more: after more tries one sentence, 2; later the run goes on."""
    with _bucket(place) as bucket:
        run = _in(bucket, place, 1, "run", *LONG)
        run.until(lambda: bucket.steps("run"))
        bucket.stop()
        found = outcome(run, time.monotonic(), 300)
        assert found.codes == [REFUSED], (found, run.said())
        _one_sentence(run, "workdir: gs://runs/run.* cannot be written")
        bucket.start()
        step = bucket.steps("run")[-1]
        again = _in(bucket, place, 1, "run", *LONG)
        again.until(lambda: bucket.steps("run")[-1] > step)
        assert outcome(again, again.send(0, signal.SIGTERM), 60).codes == [STOPPED], again.said()
        assert f"resumed at step {step} of 100000" in again.said()[0], again.said()
    return found


def no_such_bucket(place: Place) -> Outcome:
    """The bucket is not there: refused before the text is read, by one sentence."""
    with _bucket(place) as bucket:
        run = place.run(1, "--workdir=gs://nowhere/run", variables=bucket.variables)
        found = ended(run, REFUSED)
        _one_sentence(run, "workdir: gs://nowhere/run cannot be written")
        assert not any("preparing" in line for line in run.said()[0])
    return found


FAULTS = [
    sigterm_in_a_save, sigterm_in_a_validation, a_full_disk, a_read_only_disk, a_loss_that_is_no_number,
    clocks_that_differ, stale_variables, a_damaged_cache_of_text, foreign_files, kills_in_a_bucket,
    a_bucket_that_comes_back, a_bucket_that_stays_away, no_such_bucket,
]  # fmt: skip
