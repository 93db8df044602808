"""Writes a trained model as safetensors and config.json.

python -m experiments.export --workdir=runs/tree --to=exported/tree
"""

from absl import flags

from experiments import cli
from tree_ffn.errors import InputError
from tree_ffn.models import export
from tree_ffn.training.checkpoint import restore_for_inference

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string(
    "step", "best", "Which checkpoint: best (by validation loss), latest, or a number."
)
_TO = flags.DEFINE_string("to", None, "Directory of the exported model.")


def main() -> None:
    for flag in (_WORKDIR, _TO):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name a directory.")
    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    run = restore_for_inference(_WORKDIR.value, step)
    # config.json of an export may travel: the run's data section names paths, its data's hashes do not.
    config = {name: value for name, value in run.meta["config"].items() if name != "data"}
    meta = {**run.meta, "config": config}
    export.save(_TO.value, run.model, run.variables, run.config.data.tokenizer, meta)
    print(f"{_TO.value}: {export.WEIGHTS} and {export.CONFIG}")


if __name__ == "__main__":
    cli.run(main)
