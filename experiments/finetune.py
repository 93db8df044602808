r"""Trains a model further: a converted one, a run or an export; on text, or on questions with answers.

    python -m experiments.finetune --config=configs/finetune.py:start=runs/tree --workdir=runs/tuned
    python -m experiments.finetune --config=configs/finetune.py:start=runs/tree,teacher=runs/dense,kl=1 \
        --workdir=runs/distilled
    python -m experiments.finetune --config=configs/finetune.py:start=runs/tree --config.finetune.task=qa \
        --config.data.files='qa/*.jsonl' --workdir=runs/qa

A run like any other: metrics.jsonl, checkpoints, and the same command goes on from the last one. Validations
are those of the trees alone, whatever share the dense layers still have. before.json has the metrics of the
start, and of the teacher where there is one.
"""

from absl import flags
from ml_collections import config_flags

from experiments.common import cli, path_flags
from experiments.conversion.finetuning import finetune, table
from experiments.reporting import record, texts
from tree_ffn.errors import InputError
from tree_ffn.locks import only_writer

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, e.g. configs/finetune.py; --config.finetune.kl=1 changes one value.",
    lock_config=True,
)  # fmt: skip
_WORKDIR = path_flags.define_place("workdir", None, "Directory of the run; a run that is there goes on.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")
_TABLE = flags.DEFINE_string("table", "conversion", "Table of the results rows: ours, or one of your own.")
_TEXTS = flags.DEFINE_list("texts", [], texts.HELP)
_ROW = flags.DEFINE_string("row", None, "Name of the results rows, e.g. cluster_distilled.")


def main() -> None:
    check_flags(_CONFIG.value)
    with only_writer(_WORKDIR.value, "--workdir"):
        before, after = finetune(
            _CONFIG.value, _WORKDIR.value, other=texts.parse(_TEXTS.value), results=_RESULTS.value,
            table=_TABLE.value, row=_ROW.value or "",
        )  # fmt: skip
    print(table(before, after))


def check_flags(config) -> None:
    """Raises InputError unless the flags can be used."""
    if config is None:
        raise InputError("--config is missing; name a file, e.g. --config=configs/finetune.py.")
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the directory of the run, e.g. --workdir=runs/tuned.")
    record.check_row_flag(_RESULTS.value, _ROW.value, _TABLE.value)
    texts.parse(_TEXTS.value)


if __name__ == "__main__":
    cli.run(main)
