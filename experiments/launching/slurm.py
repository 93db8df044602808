"""Clusters of GPUs under SLURM: a batch script, one process a GPU."""

import shlex

from experiments.launching.job import Job, exports, restarting

TOOL = "sbatch"


def command(job: Job) -> list[str]:
    """The words of the tool, which reads what `text` returns."""
    return [TOOL, *job.submit]


def text(job: Job) -> str:
    """The batch script.

    `grace` seconds before its limit the run is told to stop, saves, and is queued again; so it is where SLURM
    takes a host away. A second job of the same name waits for the first.
    """
    again = 'scontrol requeue "$SLURM_JOB_ID"; exit "$code"'
    return f"""\
#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.slice.hosts}
#SBATCH --ntasks-per-node={job.chips_each}
#SBATCH --gpus-per-node={job.chips_each}
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --signal=TERM@{job.grace}
#SBATCH --open-mode=append
#SBATCH --output={job.name}.log
cd {shlex.quote(job.directory)} || exit
{exports(job.environment())}
{restarting(shlex.join(["srun", *job.command()]), job.restarts, again)}
"""
