"""The table of layers on TPUs: what compiling them says; nothing of it was run."""

from experiments.reporting.aggregate import block, groups, origin
from experiments.reporting.render import Table
from experiments.reporting.speed_tables import speed_name

# (metric, heading, form)
COLUMNS = (
    ("executed_gflop", "GFLOP", ",.0f"), ("accessed_gb", "GB", ",.2f"), ("temporary_mb", "MiB", ",.0f"),
    ("mcycles", "Mcycles", ",.2f"), ("unestimated_gb", "GB besides", ",.2f"),
)  # fmt: skip


def compiled_for(row: dict) -> tuple:
    """Layers compiled for one kind of chip."""
    return row["device"], row["config"]["dtype"]


def layer_tpu(rows: list[dict]) -> Table:
    """A line a width, pass and implementation, each beside the dense layer of its case."""
    lines = groups(rows, speed_name)
    values = {name: {row["metric"]: row["value"] for row in line} for name, line in lines.items()}
    cells = []
    for name, found in values.items():
        width, tokens, shape, direction, variant = name
        dense = values.get((*name[:-1], "dense"), {}).get("mcycles")
        ratio = f"{found['mcycles'] / dense:.2f}" if dense else ""
        figures = [f"{found[metric]:{form}}" for metric, _, form in COLUMNS]
        cells.append([str(width), str(tokens), shape, direction, variant, *figures[:4], ratio, *figures[4:]])
    device, dtype = compiled_for(rows[0])
    text = (
        f"`benchmark layer --topology`: one layer in {dtype} for one chip, by its compiler alone; no chip "
        "ran it, so nothing here is a time. Operations; bytes that all instructions read and write; "
        "temporaries; the compiler's own cycles, also as a multiple of dense's. GB besides: read and written "
        "by what has no cycles, which are rows read by index, sorts, and products of tiles, so that a ratio "
        f"which leaves much out compares little. {origin(rows)}"
    )
    head = ["E", "T", "shape", "pass", "", *(title for _, title, _ in COLUMNS)]
    head.insert(9, "x dense")
    return block(f"Layers for {device}, compiled", text, head, cells, rows[-1], labels=5, lines=lines)
