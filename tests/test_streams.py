"""A program whose output cannot be written goes on, or ends: in one sentence, or quietly."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from tree_ffn.streams import lasting

with lasting(lambda: {prints}):
    for i in range(3):
        print("a line")
        print("a note", file=sys.stderr)
    open("done", "w").close()
"""
BROKEN, FULL, CLOSED = "Broken pipe", "No space left on device", "Bad file descriptor"


def run(repository, place, prints, out="", err="", program=PROGRAM):
    """Exit code, stdout and stderr of a program whose streams a shell has redirected."""
    shell = f"{sys.executable} -c '{program.format(prints=prints)}' {out} {err}"
    done = subprocess.run(
        ["bash", "-c", f"({shell}) ; exit $?"], cwd=place, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def lost(prints, why):
    rest = "" if prints else "; what it prints is dropped, it goes on"
    return f"-c: stdout cannot be written ({why}){rest}.\n"


@pytest.mark.parametrize("out, why", [("> /dev/full", FULL), (">&-", CLOSED), ("> >(exit)", BROKEN)])
def test_a_run_goes_on_without_its_output(repository, tmp_path, out, why):
    waits = PROGRAM.replace("import sys", "import sys, time; time.sleep(0.3)", 1)  # until the reader has gone
    code, _, err = run(repository, tmp_path, False, out, program=waits)
    assert (code, err) == (0, lost(False, why) + 3 * "a note\n") and (tmp_path / "done").exists()


@pytest.mark.parametrize("out, why", [("> /dev/full", FULL), (">&-", CLOSED)])
def test_a_program_that_only_prints_says_that_it_cannot(repository, tmp_path, out, why):
    assert run(repository, tmp_path, True, out) == (1, "", lost(True, why))
    assert not (tmp_path / "done").exists()


def test_a_reader_that_has_gone_ends_it_quietly(repository, tmp_path):
    many = PROGRAM.replace("range(3)", "range(100_000)").replace('print("a note", file=sys.stderr)', "")
    code, out, err = run(repository, tmp_path, True, "; echo $? >&2) | (head -n 1", program=many)
    assert (code, out, err) == (0, "a line\n", "141\n") and not (tmp_path / "done").exists()


@pytest.mark.parametrize("err", ["2> /dev/full", "2>&-", "2> >(exit)"])
def test_notes_that_cannot_be_written_are_dropped(repository, tmp_path, err):
    assert run(repository, tmp_path, True, err=err) == (0, 3 * "a line\n", "")


def test_a_file_does_not_get_the_number_of_a_closed_stream(repository, tmp_path):
    program = PROGRAM.replace('open("done", "w").close()', 'assert open("done").fileno() > 2')
    (tmp_path / "done").write_text("")
    assert run(repository, tmp_path, False, ">&-", "2>&- <&-", program=program)[0] == 0


@pytest.mark.parametrize("encoding, written", [("ascii", b"\\xe9 \\u2192"), ("latin-1", b"\xe9 \\u2192")])
def test_what_an_encoding_lacks_is_written_by_its_number(repository, tmp_path, encoding, written):
    program = "from tree_ffn.streams import lasting\nwith lasting(bool): print('\\xe9 \\u2192')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, written + b"\n", b"")
