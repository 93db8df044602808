"""A job: a program that runs on every host of a slice of TPUs, or of some machines, until it is done."""

import hashlib
import os
import re
import shlex
from typing import NamedTuple

from jax.sharding import AbstractMesh

from experiments.planning.chips import SLICES, Slice
from tree_ffn.errors import InputError
from tree_ffn.training.bucket import is_bucket
from tree_ffn.training.plan import train_spec
from tree_ffn.training.sharding import BOTH, mesh_shape

LONGEST_NAME = 28  # of Cluster Toolkit, the shortest of all
OF_ONE_HOST = ("/tmp/", "/var/tmp/", "/dev/shm/")
WRONG_INPUT, STOPPED = 2, 143  # what programs end with (experiments/common/cli.py)


class Job(NamedTuple):
    """What a place is asked to run.

    Attributes:
      words: the program and its arguments, after `python`.
      topology, slice: what it runs on, by name and as it is.
      workdir: directory of the run; compiled programs are kept beside it, for all runs there.
      image: of the container; empty: it runs in `directory` by `python`, and all hosts see both.
      mount: a disk that all hosts share, (what it is, where it is mounted).
      addresses: of the hosts, for ssh.
      restarts: how often it starts again after a failure that is neither a stop nor wrong input.
      grace: seconds that a run has for saving when it is told to stop.
      queue, select: of Kubernetes: Kueue's queue, and labels of nodes.
      submit: more words for the tool that starts it.
    """

    words: list[str]
    topology: str
    slice: Slice
    workdir: str
    image: str = ""
    mount: tuple[str, str] | None = None
    directory: str = ""
    python: str = "python"
    addresses: tuple[str, ...] = ()
    restarts: int = 3
    grace: int = 300
    queue: str = ""
    select: tuple[str, ...] = ()
    submit: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Letters, digits and dashes: the end of the workdir's path, and a few digits that no other has."""
        last = re.sub(r"[^a-z0-9]+", "-", os.path.basename(self.workdir.rstrip("/")).lower()).strip("-")
        last = (last if last[:1].isalpha() else f"run-{last}")[: LONGEST_NAME - 7].rstrip("-")
        return f"{last}-{hashlib.sha256(self.workdir.encode()).hexdigest()[:6]}"

    @property
    def shape(self) -> str:
        """How the chips of a slice of TPUs lie, e.g. 4x4."""
        return self.slice.topology.partition(":")[2]

    @property
    def chips_each(self) -> int:
        """Of one host."""
        return self.slice.chips // self.slice.hosts

    def environment(self) -> dict[str, str]:
        """What all processes have in their environment: where programs are kept once they are compiled."""
        return {"JAX_COMPILATION_CACHE_DIR": f"{os.path.dirname(self.workdir.rstrip('/'))}/jax_cache"}

    def command(self) -> list[str]:
        """The words of the program on one host."""
        return [self.python, *self.words]


def slice_named(name: str, of_tpus: bool) -> Slice:
    """What a job runs on: one of `SLICES`, or GPUs as HOSTSxDEVICES.

    Raises:
      InputError: the name is not known.

    Example:
      >>> slice_named("2x8", of_tpus=False)
      Slice(chips=16, hosts=2, topology='', chip='')
    """
    known = {short: slice for short, slice in SLICES.items() if bool(slice.topology) == of_tpus}
    numbers = None if of_tpus else re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if numbers:
        hosts, each = map(int, numbers.groups())
        return Slice(hosts * each, hosts, "", "")
    if name not in known:
        more = "" if of_tpus else ", or HOSTSxDEVICES such as 2x8"
        raise InputError(f"--topology: {name!r} is not known here; use one of {', '.join(known)}{more}.")
    return known[name]


def check_config(config, slice: Slice) -> None:
    """Raises InputError unless the config's mesh and batch divide over all chips of a slice."""
    shape = mesh_shape(config.mesh.data, config.mesh.model, slice.chips)
    if shape[0] * shape[1] != slice.chips:
        said = f"mesh: data={shape[0]}, model={shape[1]} leaves some of {slice.chips} devices idle"
        raise InputError(f"{said}; use all of them.")
    train_spec(config).fit(AbstractMesh(shape, BOTH))


def check_shared(field: str, path: str, job: Job) -> None:
    """Raises InputError where a path is in no bucket, but on a disk that one host of the job sees alone.

    Args:
      field: the flag that named the path.
      path: where the job reads or writes.
      job: its image, mount and hosts.
    """
    said = f"{field}: {path!r} is on a disk that one host sees alone"
    if is_bucket(path):
        return
    if job.image and not (job.mount and path.startswith(f"{job.mount[1]}/")):
        raise InputError(f"{said}; name a place below that of --mount.")
    if not job.image and job.slice.hosts > 1 and os.path.abspath(path).startswith(OF_ONE_HOST):
        raise InputError(f"{said}; name one that all {job.slice.hosts} share.")


def exports(variables: dict) -> str:
    """Lines of a shell that set variables of the environment."""
    return "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in variables.items())


def restarting(run: str, restarts: int, stopped: str) -> str:
    """Lines of a shell that run a command until it is done; wrong input ends it at once.

    Args:
      run: the command.
      restarts: how often it starts again after a failure.
      stopped: what is done where the run was told to stop and has saved.
    """
    return f"""\
left={restarts}
until {run}; do
  code=$?
  case $code in
    {WRONG_INPUT}) exit "$code" ;;
    {STOPPED}) {stopped} ;;
    *) [ $((left -= 1)) -ge 0 ] || exit "$code" ;;
  esac
  sleep 5
done"""
