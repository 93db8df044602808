"""Slices of TPUs as virtual machines of Google's, by a queued resource: each boots into a container."""

import shlex

from experiments.launching.gke import rented
from experiments.launching.job import Job, restarting

TOOL = "gcloud"
RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


def command(job: Job) -> list[str]:
    """The words of the tool, which reads what `text` returns."""
    return [
        TOOL, "compute", "tpus", "queued-resources", "create", job.name, f"--node-id={job.name}",
        f"--accelerator-type={rented(job)}", f"--runtime-version={RUNTIMES[job.slice.chip]}", *job.submit,
        "--metadata-from-file=startup-script=/dev/stdin",
    ]  # fmt: skip


def text(job: Job) -> str:
    """The script that every machine of the slice runs whenever it boots."""
    words = ["docker", "run", "--rm", "--init", "--privileged", "--net=host", f"--stop-timeout={job.grace}"]
    words += [f"--env={name}={value}" for name, value in job.environment().items()]
    before, registry = [], job.image.split("/")[0]
    if job.mount:
        export, path = job.mount
        before += [["mkdir", "-p", path], ["mount", "-t", "nfs", export, path]]
        words.append(f"--volume={path}:{path}")
    if registry.endswith("docker.pkg.dev"):
        before.append(["gcloud", "auth", "configure-docker", "--quiet", registry])
    lines = "".join(f"{shlex.join(line)}\n" for line in before)
    run = shlex.join([*words, job.image, *job.command()])
    return f"""\
#!/bin/bash
# The slice costs until it is deleted:
# gcloud compute tpus queued-resources delete {job.name} --force
set -e
{lines}{restarting(run, job.restarts, ":")}
"""
