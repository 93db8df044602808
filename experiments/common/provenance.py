"""Where a number comes from: command, device, commit and versions, without this machine's paths."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def public_command(argv: list[str] | None = None) -> str:
    """The command line as anybody may type it: absolute directories become PATH.

    Example:
      >>> public_command(["/x/repo/experiments/train.py", "--workdir=/tmp/a", "--config=configs/smoke.py"])
      'python -m experiments.train --workdir=PATH/a --config=configs/smoke.py'
      >>> public_command(["train.py", "--workdir=~/runs/a", "--config.data.files=file:///x/a,~me/b/*.txt"])
      'python -m experiments.train --workdir=PATH/a --config.data.files=PATH/a,PATH/*.txt'
    """
    program, *rest = sys.argv if argv is None else argv
    name = os.path.splitext(os.path.basename(program))[0]
    start = r"(?:~[^,\s/=]*|file:(?://[^,\s/]*)?)?/"  # what `tree_ffn.paths.local` makes absolute is so too
    rest = [re.sub(rf"(^|[=,:]){start}(?:[^,\s/]+/)*", r"\1PATH/", word) for word in rest]
    return " ".join([f"python -m experiments.{name}", *rest])


def device_name() -> str:
    """`cpu`, or the accelerator's short name with the count where there are several: `h200`, `h100x4`."""
    devices = [device for device in jax.devices() if device.platform != "cpu"]
    if not devices:
        return "cpu"
    words = re.findall(r"[A-Za-z]*\d+\w*|v\d\w*", devices[0].device_kind)
    name = (words[0] if words else devices[0].platform).lower()
    return name if len(devices) == 1 else f"{name}x{len(devices)}"


@functools.cache
def commit() -> str:
    """Short hash of the checkout, with -dirty where tracked files differ; `unknown` without git.

    The first answer stands: programs ask when they start, since what they loaded then is what runs.
    TREE_FFN_COMMIT, where it is set, says it instead: of a copy that came without its history.
    """
    if said := os.environ.get("TREE_FFN_COMMIT"):
        return said
    where = os.path.dirname(os.path.abspath(__file__))
    try:
        run = lambda *words: subprocess.run(
            ["git", "-C", where, *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("-dirty" if run("status", "-s", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(command: str | None = None) -> dict:
    """Where a run comes from: command (by default of this process), commit, device, versions and day."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    facts = {"command": command or public_command(), "commit": commit(), "device": device_name()}
    return {**facts, "versions": versions(), "date": today}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
