"""Plans as rows of a results file."""

import os
from typing import Any

import jax

from experiments.reporting import record
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.training.plan import resolved

UNITS = {
    "weights_gb": "GB", "moments_gb": "GB", "argument_gb": "GB", "temporary_gb": "GB", "peak_gb": "GB",
    "sent_gb": "GB", "step_tflop": "TFLOP", "executed_tflop": "TFLOP", "compute_s": "s", "network_s": "s",
    "compiler_s": "s", "step_s": "s", "days": "days", "chip_hours": "h", "compile_s": "s",
}  # fmt: skip


def is_recorded(path: str, row: str, slice_name: str) -> bool:
    """Whether a results file has a plan of that name for that slice.

    Args:
      path: of the results file.
      row: name of the plan.
      slice_name: of the devices.
    """
    rows = record.load_results(path) if os.path.exists(path) else []
    return any(one["row"] == row and one["config"]["plan"]["slice"] == slice_name for one in rows)


def write(
    path: str, figures: dict[str, Any], *, table: str, row: str, config, slice_name: str, tokens: float
) -> None:
    """Appends the figures of a plan.

    Args:
      path: of the results file.
      figures: of `compile_step` and `run_of`.
      table, row: their names.
      config: of the step that was compiled.
      slice_name: of `SLICES`; "" for the devices at hand.
      tokens: of the whole training.
    """
    known = resolved(config)
    known["data"] = {"tokenizer": load_tokenizer(config.data.tokenizer).name}
    known["plan"] = {"slice": slice_name, "devices": figures["devices"], "tokens": tokens}
    kind = str(figures["device"])
    # The devices at hand are called as in all rows (`provenance.device_name`).
    device = None if kind == jax.devices()[0].device_kind else kind.lower().replace(" ", "_")
    record.append_rows(path, [
        record.make_row(table, row, metric, figures[metric], None, known, unit, device)
        for metric, unit in UNITS.items() if metric in figures
    ])  # fmt: skip
