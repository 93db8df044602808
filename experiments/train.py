"""Trains a language model, or goes on with a run.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/tree
    python -m experiments.train --config=configs/quickstart.py --config.optim.lr=1e-3 --workdir=runs/slow
    python -m experiments.train --config=configs/default.py --config.model.preset=opt_125m --describe

The workdir gets config.json, origin.json (command, commit, versions), metrics.jsonl, usage/,
TensorBoard events and checkpoints.
The same command again goes on from the last checkpoint. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU save
and exit with 128 + their number. To look inside with a debugger or print: --nojit, with a small model.

On several hosts: the same command on each; without a launcher that JAX knows, JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who (docs/guides/training.md).
"""

from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments.common import cli, path_flags, provenance
from experiments.reporting import record, texts
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.models.cost import describe
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import distributed
from tree_ffn.training.loop import train
from tree_ffn.training.workdir import read_json
from tree_ffn.tree.kernels import first_use

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The run, e.g. configs/quickstart.py; --config.optim.lr=1e-3 changes one value.",
    lock_config=True,
)
_WORKDIR = path_flags.define_place("workdir", None, "Directory of the run; a run that is there goes on.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print sizes and FLOPs of the model; train nothing.")
_NOJIT = flags.DEFINE_bool("nojit", False, "Run without compiling: slow, but print and breakpoints work.")
_RESULTS = path_flags.define_written(
    "results", None, "Append the final metrics to this results file (JSONL)."
)
_TABLE = flags.DEFINE_string("table", "cpu_small", "Table of the results rows: ours, or a name of your own.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds without a sign of life after which one of several processes counts as lost."
)
_TEXTS = flags.DEFINE_list("texts", [], texts.HELP)
_ROW = flags.DEFINE_string("row", None, "Name of the results row, e.g. tree_hard_P12_W1.")


def main() -> None:
    config = _CONFIG.value
    if config is None:
        raise InputError("--config is missing; name a file, e.g. --config=configs/quickstart.py.")
    if _DESCRIBE.value:
        model = model_spec_from_config(config, load_tokenizer(config.data.tokenizer).vocab_size)
        print(describe(model)[0])
        return
    record.check_row_flag(_RESULTS.value, _ROW.value, _TABLE.value)
    if _WORKDIR.value is None:
        raise InputError("--workdir is missing; name the directory of the run, e.g. --workdir=runs/first.")
    if _NOJIT.value:
        jax.config.update("jax_disable_jit", True)

    check_positive_int("--heartbeat", _HEARTBEAT.value)
    with distributed.started(_HEARTBEAT.value):
        first_use.build("gpu")
        train_and_record(config)


def train_and_record(config) -> None:
    """A run, from its texts to its results rows."""
    other = texts.parse(_TEXTS.value)
    figures = train(config, _WORKDIR.value, origin=provenance.origin)

    names: dict[str, Any] = {"table": _TABLE.value, "row": _ROW.value}
    results = _RESULTS.value if distributed.is_first() else None
    if other:
        texts.score_at_end(_WORKDIR.value, config, other, results=results, **names)
    if results:  # last: a run whose validation loss is recorded counts as done for a sweep
        meta = read_json(_WORKDIR.value, "data.json")
        record.append_figures(results, figures, config=config, data_meta=meta, **names)


if __name__ == "__main__":
    cli.run(main, prints=lambda: _DESCRIBE.value)
