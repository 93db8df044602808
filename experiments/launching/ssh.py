"""Plain hosts: a process on each, by ssh, which stays as long as this one does."""

import shlex

from experiments.launching.job import STOPPED, Job, exports, restarting
from tree_ffn.training.distributed import ADDRESS, COUNT, INDEX

TOOL = "ssh"
PORT = 8476


def command(job: Job) -> list[str]:
    """The words of the shell, which reads what `text` returns."""
    del job
    return ["bash"]


def text(job: Job) -> str:
    """The script. Where it ends the hosts' terminals are gone: their processes save and end."""
    started = "\n".join(f"{shlex.join(_words(job, index))} & pids+=($!)" for index in range(job.slice.hosts))
    return f"""\
#!/bin/bash
pids=()
trap 'kill "${{pids[@]}}"' HUP INT TERM
{started}
code=0
for pid in "${{pids[@]}}"; do
  wait "$pid" || code=$?
done
exit "$code"
"""


def _words(job: Job, index: int) -> list[str]:
    """What starts the process of one host."""
    first = job.addresses[0].rpartition("@")[2]
    variables = job.environment() | {ADDRESS: f"{first}:{PORT}", COUNT: job.slice.hosts, INDEX: index}
    run = restarting(shlex.join(job.command()), job.restarts, f"exit {STOPPED}")
    body = f"cd {shlex.quote(job.directory)} || exit\n{exports(variables)}\n{run}"
    return ["ssh", "-n", "-tt", "-o", "BatchMode=yes", *job.submit, job.addresses[index], body]
