"""The table of pruning: what every threshold of experiments/prune.py leaves of a model, and what it costs."""

import statistics

from experiments.reporting.aggregate import (
    NO_MATTER,
    block,
    by_seed,
    groups,
    last_of,
    lines_of,
    mean,
    origin,
    spread,
    task,
)
from experiments.reporting.render import Table


def prune_small(rows: list[dict]) -> Table:
    """A line per model and threshold; the rise is against the same seed's unpruned model.

    Seeds may have been pruned at different steps, each at its best; one seed at two steps is refused.
    """
    for one in groups(rows, lambda row: (row["row"], str(row["seed"]))).values():
        lines_of(one, free=r"prune\.threshold$|" + NO_MATTER)
    lines = lines_of(rows, free=r"prune\.(threshold|step)$|" + NO_MATTER)
    cells = []
    for name, line in lines.items():
        points = groups(line, _threshold)
        for threshold, point in points.items():
            rise = by_seed(point, "loss_rise").values()
            cells.append([
                f"`{name}`", "unpruned" if threshold < 0 else f"{threshold:g}",
                mean(point, "units_kept", ",.0f"), mean(point, "units_share", ".1%"),
                _megabytes(point), spread(by_seed(point, "val_loss").values()),
                "" if threshold < 0 else spread(rise, "+.4f"), str(len(rise)),
            ])  # fmt: skip
    said = [row["config"]["prune"] for row in rows]
    tokens = " or ".join(f"{n:,}" for n in sorted({prune["tokens"] for prune in said}))
    texts = ", ".join(sorted({prune["sha256"][:12] for prune in said}))
    text = (
        f"Layers pruned after training by what calibration text visits: {task(rows)}. A subtree, or an "
        f"expert, is removed that no more than a share (the threshold) of {tokens} calibration tokens "
        f"(sha256 {texts}) visits; 0 removes what none visits. Held-out text; mean ± standard deviation over "
        f"seeds; a rise of the loss is against the unpruned model of the seed. {origin(rows)}"
    )
    head = ["", "threshold", "units kept", "share", "MB", "val loss", "rise", "seeds"]
    steps = rows[0]["config"]["train"]["steps"]
    return block(f"Pruning, {steps} steps", text, head, cells, last_of(lines), labels=2)


def _threshold(row: dict) -> float:
    """The row's threshold; below 0 for the unpruned model, so that it comes first."""
    threshold = row["config"]["prune"]["threshold"]
    return -1.0 if threshold is None else threshold


def _megabytes(point: list[dict]) -> str:
    values = by_seed(point, "bytes").values()
    return f"{statistics.fmean(values) / 1e6:.2f}" if values else ""
