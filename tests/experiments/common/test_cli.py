"""How programs start: what all of them do before their own part begins."""

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, sys

sys.argv[0] = "-m"  # as while `python -m experiments.train` looks for the program
signal.signal(signal.SIGINT, signal.{handler})
import experiments

print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
os.kill(os.getpid(), signal.SIGINT)
"""


def interrupted(repository, handler):
    """Exit code and all output of a program that gets a Ctrl-C while it still imports."""
    program = PROGRAM.format(handler=handler)
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_ctrl_c_ends_a_program_that_still_imports(repository):
    assert interrupted(repository, "default_int_handler") == (-signal.SIGINT, "False\n")
    assert interrupted(repository, "SIG_IGN") == (0, "True\n")  # a job in the background of a shell
