"""Why JAX aborted a process of several, as one sentence.

Where another process is lost, JAX's C++ aborts this one with 20 lines and a stack trace on stderr. No Python
runs before that. So what goes to stderr passes through a small process, which outlives this one. It is this
file, run as a program.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import IO

_SERVICE = re.compile(rb"[WEF]\d{4} [\d:.]+ +\d+ (coordination_service|preemption_sync_manager|client\.h)")
_FATAL, _STACK = b"Terminating process because", b"*** Check failure stack trace"
_started: list[subprocess.Popen] = []


def start() -> None:
    """From here on stderr of this process passes through another, which waits for its end."""
    command = [sys.executable, "-S", "-E", os.path.abspath(__file__), os.path.basename(sys.argv[0])]
    # A session of its own: what interrupts this process does not end that one.
    _started.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    sys.stderr.flush()
    if pipe := _started[-1].stdin:
        os.dup2(pipe.fileno(), 2)
        pipe.close()


def sentence(said: bytes) -> str:
    """What happened, by what JAX's service said.

    Example:
      >>> sentence(b"tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks have crashed.")
      'process 1 of this run was lost; its last whole checkpoint stays: start all again to go on.'
    """
    if b"RegisterTask" in said:
        return "some processes of this run did not come in time; start as many as were announced."
    lost = re.search(rb"sending heartbeats\):\s*((?:\d+\s+)+)", said)
    which = ", ".join(lost[1].decode().split()) if lost else "0"  # who coordinates says nothing of itself
    return f"process {which} of this run was lost; its last whole checkpoint stays: start all again to go on."


def pass_on(lines: Iterable[bytes], out: IO[bytes], program: str) -> None:
    """Writes lines on, but for those of JAX's service before an abort; they become `sentence`.

    Args:
      lines: what the process writes, until it has ended.
      out: where to.
      program: begins the sentence.
    """
    held, aborts = b"", False
    for line in lines:
        if held or _SERVICE.match(line):
            held += line
        else:
            out.write(line)
        if not aborts and _STACK in line and _FATAL in held:  # a container may go with the process
            aborts = True
            out.write(f"{program}: {sentence(held)}\n".encode())
        out.flush()
    if not aborts:
        out.write(held)
        out.flush()


if __name__ == "__main__":
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)
    pass_on(sys.stdin.buffer, sys.stderr.buffer, sys.argv[1])
