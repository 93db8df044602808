"""What a training run needs, before anything is rented: memory, operations, what devices send, days.

    python -m experiments.plan --config=configs/recipe.py:preset=opt_1.3b --topology=v5e-16
    python -m experiments.plan --config=configs/t2_1p3b.py:row=dense --topology=v5e:2x4 --search
    python -m experiments.plan --config=configs/t1_small.py:row=dense     # for the devices at hand

The training step is compiled for the slice, which need not be here (`pip install 'tree_ffn[tpu]'` brings the
compiler), and nothing is allocated. Memory is the compiler's own account, and so is whether the step fits.
What devices send each other is read off the program. Times are arithmetic: half of the peak of the chip's
products and links is reached, and what is sent overlaps with computing. What a plan cannot know: how much of
the peak the chip really reaches, how fast text arrives, how often hosts fail.

--search tries, until one fits: model.remat none, dots and full, with mesh.data over all chips; then, with
full, mesh.model of 8. The first that fits computes least and is recommended.
"""

import copy

from absl import flags
from ml_collections import config_flags

from experiments.common import cli, path_flags
from experiments.planning import chips, compiled_step
from experiments.reporting import record
from tree_ffn.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, e.g. configs/recipe.py; --config.train.batch_size=512 changes one value.",
    lock_config=True,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"A slice that need not be here: {', '.join(chips.SLICES)}, or as v5e:2x4."
)
_SEARCH = flags.DEFINE_bool("search", False, "Try ways to divide and recompute until one fits.")
_RESULTS = path_flags.define_written("results", None, "Append the figures to this results file (JSONL).")
_TABLE = flags.DEFINE_string("table", "t2_plan", "Table of the results rows.")
_ROW = flags.DEFINE_string("row", None, "Name of the results row, e.g. dense.")

TRIES = (("none", 1), ("dots", 1), ("full", 1), ("full", 8))


def main() -> None:
    config = _CONFIG.value
    if config is None:
        raise InputError("--config is missing; name a file, e.g. --config=configs/recipe.py.")
    record.check_row_flag(_RESULTS.value, _ROW.value, _TABLE.value)
    devices = compiled_step.devices_of(chips.topology(_TOPOLOGY.value)) if _TOPOLOGY.value else None
    config, figures = searched(config, devices) if _SEARCH.value else (config, None)
    figures = figures or compiled_step.compile_step(config, devices)
    print(compiled_step.page(figures))
    if _RESULTS.value:
        compiled_step.record_step(_RESULTS.value, figures, table=_TABLE.value, row=_ROW.value, config=config)


def searched(config, devices: list | None):
    """The config of the first of TRIES that fits, and its figures.

    Raises:
      InputError: none of them fits.
    """
    for remat, parts in TRIES:
        tried = copy.deepcopy(config)
        tried.model.remat, tried.mesh.data, tried.mesh.model = remat, -1, parts
        named = f"model.remat={remat}, mesh.model={parts}"
        try:
            figures = compiled_step.compile_step(tried, devices)
        except compiled_step.DoesNotFit as error:
            print(f"{named}: {error}", flush=True)
            continue
        print(f"{named}: fits, and is recommended", flush=True)
        return tried, figures
    raise InputError("--search: nothing fits; use a larger --topology or more train.grad_accum_steps.")


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
