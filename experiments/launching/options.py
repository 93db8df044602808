"""The flags by which jobs are started, of `launch` and of `ablate --launch=...`, and what starts them."""

import os
import shlex
import shutil
import subprocess
import sys
from typing import Any

from absl import flags

from experiments.launching import gke, queued, slurm, ssh
from experiments.launching.job import Job, check_config, check_shared, slice_named
from tree_ffn.errors import InputError, check_choice
from tree_ffn.training.bucket import is_bucket

flags.disclaim_key_flags()  # they are those of the program that calls `define`

PLACES = {"gke": gke, "queued": queued, "slurm": slurm, "ssh": ssh}
IN_IMAGE = ("gke", "queued")
# Flags that not all places know, and whether they are needed there.
OWN = {
    "image": (IN_IMAGE, True), "mount": (IN_IMAGE, False), "queue": (("gke",), False),
    "select": (("gke",), False), "hosts": (("ssh",), True), "grace": ((*IN_IMAGE, "slurm"), False),
}  # fmt: skip


def define(own: flags.FlagValues) -> None:
    """Defines the flags, e.g. in flags.FLAGS."""
    to: dict[str, Any] = {"flag_values": own}
    flags.DEFINE_string("topology", "", "A slice, e.g. v5e-16; slurm, ssh: HOSTSxDEVICES, e.g. 2x8.", **to)
    flags.DEFINE_string("image", "", "gke, queued: the container's image, made by the Dockerfile.", **to)
    words = "gke: CLAIM:/PATH, a volume claim; queued: HOST:/EXPORT:/PATH, an NFS export."
    flags.DEFINE_string("mount", "", words, **to)
    flags.DEFINE_string("queue", "", "gke: the queue of Kueue.", **to)
    flags.DEFINE_list("select", [], "gke: labels of nodes, e.g. cloud.google.com/gke-spot=true.", **to)
    flags.DEFINE_list("hosts", [], "ssh: addresses, e.g. a,b; that of process 0 first.", **to)
    flags.DEFINE_string("submit", "", "More words for kubectl, gcloud, sbatch or ssh, e.g. --time=60.", **to)
    flags.DEFINE_integer("restarts", 3, "Restarts after failures; stops do not count.", lower_bound=0, **to)
    flags.DEFINE_integer("grace", 300, "Seconds for saving after a stop; not for ssh.", lower_bound=1, **to)
    flags.DEFINE_bool("dry_run", False, "Print what would be started.", **to)


def parse(words: str) -> tuple[str, flags.FlagValues]:
    """The place and the flags that one text names, e.g. `slurm --topology=2x8`."""
    own = flags.FlagValues()
    define(own)
    try:
        _, place, *rest = own(["launch", *shlex.split(words)])
    except (flags.Error, ValueError) as error:
        raise InputError(f"--launch: {words!r} is not allowed; {error}.") from error
    if rest:
        raise InputError(f"--launch: {rest[0]!r} is not known; flags have the form --name=value.")
    return place, own


def check_flags(place: str, own: flags.FlagValues) -> None:
    """Raises InputError for flags that are missing, or are of another place."""
    check_choice("place", place, PLACES)
    for name, (places, needed) in OWN.items():
        if place not in places and own[name].value != own[name].default:
            raise InputError(f"--{name} is not allowed for {place}; it is of {' and '.join(places)}.")
        if needed and place in places and not own[name].value:
            raise InputError(f"--{name} is missing; --help has examples.")
    for label in own["select"].value or ():
        if not label.partition("=")[1]:
            raise InputError(f"--select: {label!r} is not allowed; use KEY=VALUE.")


def make_job(place: str, own: flags.FlagValues, program: str, arguments: list[str], config) -> Job:
    """The job of one run.

    Args:
      place: of PLACES.
      own: the flags of `define`.
      program, arguments: what runs, e.g. train and the words after it, --config and --workdir among them.
      config: of the run.

    Raises:
      InputError: a flag is wrong, or the run cannot be divided over the hosts.
    """
    check_flags(place, own)
    topology, hosts, mount = own["topology"].value, tuple(own["hosts"].value), own["mount"].value
    slice = slice_named(topology, of_tpus=place in IN_IMAGE)
    if place == "ssh" and len(hosts) != slice.hosts:
        raise InputError(f"--hosts: {','.join(hosts)!r} is not allowed; {topology} needs {slice.hosts}.")
    check_config(config, slice)
    paths = dict(word.split("=", 1) for word in arguments if "=" in word)
    job = Job(
        words=["-m", f"experiments.{program}", *arguments], topology=topology, slice=slice,
        workdir=paths["--workdir"], image=own["image"].value, mount=_mount(mount) if mount else None,
        addresses=hosts, restarts=own["restarts"].value, grace=own["grace"].value, queue=own["queue"].value,
        select=tuple(own["select"].value), submit=tuple(shlex.split(own["submit"].value)),
    )  # fmt: skip
    for field in ("--workdir", "--results"):
        check_shared(field, paths.get(field, job.workdir), job)
    if place in IN_IMAGE:
        if os.path.isabs(paths["--config"]):
            raise InputError(f"--config: {paths['--config']!r} is not in the image; name one of configs/.")
        return job
    workdir = job.workdir if is_bucket(job.workdir) else os.path.abspath(job.workdir)
    return job._replace(directory=os.getcwd(), python=sys.executable, workdir=workdir)


def _mount(words: str) -> tuple[str, str]:
    """What is mounted, and where."""
    what, _, path = words.rpartition(":")
    if not (what and path.startswith("/") and path.rstrip("/")):
        raise InputError(f"--mount: {words!r} is not allowed; use CLAIM:/PATH, or HOST:/EXPORT:/PATH.")
    return what, path.rstrip("/")


def start(place: str, jobs: list[Job], dry_run: bool) -> None:
    """Starts jobs one after the other, or prints what would start them.

    Args:
      place: key of `PLACES`.
      jobs: in order.
      dry_run: only print.

    Raises:
      InputError: the tool of the place is not installed.
      SystemExit: it failed; jobs after that are not started.
    """
    module = PLACES[place]
    if not dry_run and shutil.which(module.TOOL) is None:
        raise InputError(f"{place}: {module.TOOL} is not installed; install it, or take --dry_run's text.")
    for job in jobs:
        words, text = module.command(job), module.text(job)
        if dry_run:
            print(f"{shlex.join(words)} <<'END'\n{text}END")
        elif code := _run(words, text):
            sys.exit(code)


def _run(words: list[str], text: str) -> int:
    """The exit code of a tool that reads `text`; Ctrl-C reaches both, and the tool ends first."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, text=True)
    try:
        process.communicate(text)
    except KeyboardInterrupt:
        process.wait()
        raise
    return process.returncode
