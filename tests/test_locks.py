"""One writer at a time, among processes; whose lock frees itself when they die."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from tree_ffn import locks
from tree_ffn.errors import InputError

HOLD = "import sys, time; from tree_ffn.locks import only_writer\n"
HOLD += "with only_writer(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@contextlib.contextmanager
def another_process(repository, directory):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_a_dead_one_holds_nothing(repository, tmp_path):
    workdir = tmp_path / "run"
    with another_process(repository, workdir) as first:
        who = rf"workdir: .*run is in use by process {first.pid} on host \S+ since 20\S+ \S+; wait until"
        with pytest.raises(InputError, match=who), locks.only_writer(str(workdir)):
            pass
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert os.listdir(workdir) == [locks.NAME]
    with locks.only_writer(str(workdir)):
        assert str(os.getpid()) in (workdir / locks.NAME).read_text()
    assert os.listdir(workdir) == []


def test_who_waits_is_told_for_whom(repository, tmp_path):
    path, told = tmp_path / locks.NAME, []

    def wait(holder):
        told.append(str(holder))
        first.kill()

    with another_process(repository, tmp_path) as first, locks.locked(str(path), wait):
        assert len(told) == 1 and told[0].startswith(f"process {first.pid} on host ")
        assert str(os.getpid()) in path.read_text()


def test_a_process_may_enter_its_own_again(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locks.only_writer(str(tmp_path / "run")):
        with locks.only_writer(str(tmp_path / "link")):
            pass
        with pytest.raises(BlockingIOError), open(tmp_path / "run" / locks.NAME) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_was_there_or_is_filled_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with contextlib.suppress(ZeroDivisionError), locks.only_writer(str(tmp_path / name)):
            (tmp_path / "new" / "file").write_text("") if name == "new" else 1 / 0
    assert sorted(os.listdir(tmp_path)) == ["new", "there"]


def test_a_lock_that_was_just_removed_counts_for_nothing(tmp_path, monkeypatch):
    """Its holder removes it; who opened it before that has to open the next one."""
    path, opened = str(tmp_path / "lock"), []

    def flock(file, operation):
        opened.append(file)
        if len(opened) == 1:
            os.remove(path)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked(path):
        assert len(opened) == 2 and os.path.samestat(os.stat(path), os.fstat(opened[1].fileno()))


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .*two writers"), locks.only_writer(str(tmp_path)):
        pass


@pytest.mark.parametrize("file", ["run", "run/.lock"])
def test_what_cannot_be_a_directory_is_named(tmp_path, file):
    if file == "run":
        (tmp_path / "run").write_text("")
    else:
        (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--to: .*run cannot be written \("):
        with locks.only_writer(str(tmp_path / "run"), "--to"):
            pass


def test_a_new_directory_is_empty_or_not_there(tmp_path):
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with locks.new_directory(str(tmp_path / name), "--to"):
            (tmp_path / name / "model").write_text("whole")
        with pytest.raises(InputError, match=f"--to: .*{name} is there already; name a new directory"):
            with locks.new_directory(str(tmp_path / name), "--to"):
                pass
        assert (tmp_path / name / "model").read_text() == "whole"
    with pytest.raises(InputError, match="model is there already"):
        with locks.new_directory(str(tmp_path / "new" / "model"), "--to"):
            pass
