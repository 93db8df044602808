"""Starts a training run on rented or shared machines: TPUs on GKE or by queued resources, SLURM, plain hosts.

    python -m experiments.launch gke --config=configs/recipe.py:preset=opt_1.3b --topology=v5e-16 \\
        --image=IMAGE --mount=CLAIM:/shared --workdir=/shared/runs/first --dry_run
    python -m experiments.launch queued --config=configs/recipe.py --topology=v5e-16 --image=IMAGE \\
        --mount=10.0.0.2:/export:/shared --workdir=/shared/runs/first --submit='--zone=us-west4-a --spot'
    python -m experiments.launch slurm --config=configs/recipe.py --topology=2x8 \\
        --workdir=/nfs/runs/first --submit='--partition=gpu --time=8:00:00'
    python -m experiments.launch ssh --config=configs/recipe.py --topology=2x8 --hosts=a,b \\
        --workdir=/nfs/runs/first

--dry_run prints a command and the text that it reads, and starts nothing: a JobSet for kubectl, the script
that machines of a slice run as they boot, a batch script, or lines of ssh. Without it that command runs.
`ablate --launch='gke --topology=v5e-16 ...'` starts every run of a table so.

Before anything starts: the config divides over all devices of --topology, and --workdir is in a bucket or on
a disk that its hosts share. A run that is told to stop saves within --grace seconds and is started again. A
run that fails is started again --restarts times, unless its input is wrong. Compiled programs are kept in
jax_cache beside the workdir. gke and queued run an --image (Dockerfile); slurm and ssh run this folder with
this Python, which all hosts see.
"""

from absl import flags
from ml_collections import config_flags

from experiments.common import cli, path_flags
from experiments.common.config_words import written
from experiments.launching import options
from tree_ffn.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, e.g. configs/recipe.py; --config.optim.lr=1e-3 changes one value.",
    lock_config=True,
)  # fmt: skip
_WORKDIR = path_flags.define_place("workdir", None, "Directory of the run, as its hosts see it.")
options.define(flags.FLAGS)


def main(suite: str = "") -> None:
    for flag, example in ((_CONFIG, "configs/recipe.py"), (_WORKDIR, "/shared/runs/first")):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name one, e.g. --{flag.name}={example}.")
    given = flags.FLAGS["config"]
    values = config_flags.get_override_values(given)
    words = [
        f"--config={config_flags.get_config_filename(given)}",
        *(f"--config.{key}={written(value)}" for key, value in values.items()),
        f"--workdir={_WORKDIR.value}",
    ]
    job = options.make_job(suite, flags.FLAGS, "train", words, _CONFIG.value)
    options.start(suite, [job], flags.FLAGS.dry_run)


if __name__ == "__main__":
    cli.run(main, prints=lambda: flags.FLAGS.dry_run)
