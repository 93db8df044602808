"""What a training run needs, before anything is rented: memory, operations, what devices send, days.

    python -m experiments.plan --config=configs/scale.py:preset=opt_1.3b,chips=16 --topology=v5e-16
    python -m experiments.plan --config=configs/scale.py:preset=opt_6.7b,kind=dense,chips=64 \\
        --topology=v5p-128 --search --tokens=100e9 --html=plan.html
    python -m experiments.plan --config=configs/t1_small.py:row=dense     # for the devices at hand

The training step is compiled for the slice, which need not be here, and nothing is allocated: `pip install
'tree_ffn[tpu]'` brings the compiler for TPUs, tree_ffn[cuda] that for GPUs. Memory is the compiler's account,
and so is whether the step fits. What devices send each other is read off the program. Times are arithmetic:
half of the peak of the chip's products and links is reached, and what is sent overlaps with computing.

--search tries, until one fits: model.remat none, dots and full with the config's microbatches, then with one
sequence a device at a time, mesh.data over all chips; the same with train.grad_sync=microbatch; at last with
mesh.model of 8. The first that fits is planned.

Many plans, of which those that the file has are left out:

    for kind in dense leaf moe tree; do python -m experiments.plan --topology=v5e-16 --row=${kind}_1.3b \\
        --config=configs/scale.py:preset=opt_1.3b,kind=$kind,chips=16 --results=results/plan.jsonl; done
"""

from absl import flags
from ml_collections import config_flags

from experiments.common import cli, path_flags
from experiments.planning import page, rows
from experiments.planning.chips import SLICES, slice_of
from experiments.planning.choices import chosen, searched
from experiments.planning.compiled_step import compile_step, run_of
from experiments.planning.devices import devices_of
from experiments.reporting import html_page, record
from tree_ffn.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, e.g. configs/recipe.py; --config.train.batch_size=512 changes one value.",
    lock_config=True,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string("topology", "", f"A slice that need not be here: {', '.join(SLICES)}.")
_TOKENS = flags.DEFINE_float("tokens", 0.0, "The whole training, e.g. 26e9; 0: the config's steps.", 0.0)
_SEARCH = flags.DEFINE_bool("search", False, "Try ways to divide and recompute until one fits.")
_HTML = path_flags.define_written("html", None, "Write the plan as a page too, e.g. plan.html.")
_RESULTS = path_flags.define_written("results", None, "Append the figures to this results file (JSONL).")
_TABLE = flags.DEFINE_string("table", "plan", "Table of the results rows.")
_ROW = flags.DEFINE_string("row", None, "Name of the results row, e.g. dense_1.3b.")


def main() -> None:
    config, name = _CONFIG.value, _TOPOLOGY.value
    if config is None:
        raise InputError("--config is missing; name a file, e.g. --config=configs/recipe.py.")
    record.check_row_flag(_RESULTS.value, _ROW.value, _TABLE.value)
    if _HTML.value:
        html_page.check_target(_HTML.value, "--html")
    where = slice_of(name) if name else None
    if _RESULTS.value and rows.is_recorded(_RESULTS.value, _ROW.value, name):
        print(f"{_RESULTS.value} has {_ROW.value} for {name or 'the devices at hand'}")
        return
    devices = devices_of(where) if where else None
    tried = searched(config, devices) if _SEARCH.value else []
    if tried:
        config = chosen(config, tried[-1])
    figures = tried[-1].figures if tried else compile_step(config, devices)
    if figures is None:
        raise InputError("--search: nothing fits; use a larger --topology, or fewer rows a step.")
    tokens = _TOKENS.value or config.train.steps * figures["tokens"]
    found = page.page(figures, tokens, tried)
    print(found.text())
    if _HTML.value:
        html_page.write(_HTML.value, found.html(), "--html")
    if _RESULTS.value:
        rows.write(
            _RESULTS.value, figures | run_of(figures, tokens), table=_TABLE.value, row=_ROW.value,
            config=config, slice_name=name, tokens=tokens,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
