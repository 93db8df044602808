"""Writes a trained model as safetensors and config.json, in our own form or in that of Hugging Face.

    python -m experiments.export --workdir=runs/tree --to=exported/tree
    python -m experiments.export --export=exported/opt --to=opt-back --format=hf
    python -m experiments.export --workdir=runs/dense --to=dense-gpt2 --format=hf --family=gpt2

--format=hf takes models of equal dense layers with GELU or ReLU. One that came from a checkpoint of GPT-2
or OPT (experiments/import_model.py) goes back as what it was, bit for bit; its tokenizer's files go with
it.
"""

from absl import flags

from experiments.common import cli, path_flags, tokenizer_files
from tree_ffn.errors import InputError
from tree_ffn.huggingface import pretrained
from tree_ffn.locks import only_writer
from tree_ffn.models import export

_WORKDIR = path_flags.define("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string(
    "step", "best", "Which checkpoint: best (by validation loss), latest, or a number."
)
_EXPORT = path_flags.define("export", None, "Instead of a run: directory of an exported model.")
_TO = path_flags.define("to", None, "Directory of the exported model.")
_FORMAT = flags.DEFINE_enum("format", "tree_ffn", ["tree_ffn", "hf"], "Whose form it has.")
_FAMILY = flags.DEFINE_enum(
    "family", "gpt2", list(pretrained.FAMILIES), "Of --format=hf, for a model that was not imported."
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "Of --format=hf: float32, bfloat16 or float16; by default as the model came or is stored."
)


def main() -> None:
    if (_WORKDIR.value is None) == (_EXPORT.value is None):
        raise InputError("--workdir is missing; name a directory (or one with --export, but not both).")
    if _TO.value is None:
        raise InputError("--to is missing; name a directory.")
    if _EXPORT.value is not None and _FORMAT.value != "hf":
        raise InputError("--export: that model is in our own form already; --format=hf writes another.")
    for flag in (_FAMILY, _DTYPE):
        if flag.present and _FORMAT.value != "hf":
            raise InputError(f"--{flag.name}: {flag.value!r} is of --format=hf; give both, or neither.")
    with only_writer(_TO.value, "--to"):
        _export()


def _export() -> None:
    spec, variables, tokenizer, meta = _from_export() if _EXPORT.value else _from_run()
    if _FORMAT.value == "hf":
        origin = meta.get("pretrained")
        pretrained.save(_TO.value, spec, variables, origin, family=_FAMILY.value, dtype=_DTYPE.value)
        if _EXPORT.value:
            tokenizer_files.copy(tokenizer_files.files_in(_EXPORT.value), _TO.value)
        print(f"{_TO.value}: a Hugging Face checkpoint")
        return
    export.save(_TO.value, spec, variables, tokenizer, meta)
    print(f"{_TO.value}: {export.WEIGHTS} and {export.CONFIG}")


def _from_run():
    # Checkpoints need orbax; an exported model does not.
    from tree_ffn.training.restore import restore_for_inference

    run = restore_for_inference(_WORKDIR.value, _STEP.value)
    # config.json of an export may travel: the run's data section names paths, its data's hashes do not.
    config = {name: value for name, value in run.meta["config"].items() if name != "data"}
    return run.model, run.variables, run.config.data.tokenizer, {**run.meta, "config": config}


def _from_export():
    spec, variables, config = export.load(_EXPORT.value)
    return spec, variables, config["tokenizer"], config["meta"]


if __name__ == "__main__":
    cli.run(main)
