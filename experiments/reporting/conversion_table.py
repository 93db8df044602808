"""The tables of conversion: what dense layers keep as sparse ones, and what fine-tuning brings back."""

import math

from experiments.reporting.aggregate import (
    NO_MATTER,
    block,
    by_seed,
    last_of,
    learning_rate,
    lines_of,
    mean,
    origin,
    paired,
    setting,
    spread,
    task,
    trained,
)
from experiments.reporting.render import Table

FREE = r"(convert|finetune\.converted)\.(seed|step)$|" + NO_MATTER
KEPT = ("kept", "kept_experts", "kept_oracle", "kept_static")


def kind_of(row: dict) -> tuple:
    """What makes a table of its own: conversions, and fine-tunings of one length, on one device."""
    return (*trained(row), "fine-tuned" if "finetune" in row["config"] else "converted")


def conversion(rows: list[dict]) -> Table:
    """Rows of one `kind_of`."""
    lines = lines_of(rows, free=FREE)
    return tuned(rows, lines) if "finetune" in rows[0]["config"] else converted(rows, lines)


def converted(rows: list[dict], lines: dict[str, list[dict]]) -> Table:
    """A line per method and layer."""
    others = other_texts(rows)
    cells = []
    for name, line in lines.items():
        shares = [spread(by_seed(line, metric).values(), ".3f") for metric in KEPT]
        loss, rise = by_seed(line, "val_loss").values(), by_seed(line, "loss_rise").values()
        cells.append([
            f"`{name}`", mean(line, "active_share", ".1%"), mean(line, "flops_share", ".1%"), *shares,
            spread(loss), spread(rise, "+.4f"), *(spread(by_seed(line, text).values()) for text in others),
            str(len({row["seed"] for row in line})),
        ])  # fmt: skip
    text = (
        f"Dense layers as sparse ones, before any training: {task(rows)}. FLOPs: those of the layer, its "
        "routers too (which are not counted as active units), as a share of the dense layer's. Kept: share "
        "of the dense layers' output on held-out tokens (1 is all, 0 what its mean gives; mean over layers). "
        "Experts: the same for the best paths, or leaves, of every token; what lies between is lost by "
        "routers. Oracle and "
        "static: the best A units of each token and the best A units for all. refits0: output weights are "
        "the dense layer's; else solved for by least squares, for oracle and static too. Means over seeds. "
        f"{origin(rows)}"
    )
    head = ["", "active share", "FLOPs", "kept", "experts", "oracle", "static", "val loss", "rise", *others]
    return block("Conversion", text, [*head, "seeds"], cells, last_of(lines), lines=lines)


def tuned(rows: list[dict], lines: dict[str, list[dict]]) -> Table:
    """A line per start and way to fine-tune."""
    dense = by_seed(rows, "loss_teacher")
    others = other_texts(rows)
    cells = []
    for name, line in lines.items():
        before, after = by_seed(line, "loss_before"), by_seed(line, "val_loss")
        ratio = lambda losses: spread(paired(lambda d, x: math.exp(x - d), dense, losses), ".3f")
        near = spread(by_seed(line, "tokens_until_near").values(), ",.0f")
        cells.append([
            f"`{name}`", mean(line, "active_share", ".1%"), spread(before.values()), spread(after.values()),
            ratio(before), ratio(after), near, *(spread(by_seed(line, text).values()) for text in others),
            learning_rate(line), f"{setting(line[0], 'finetune.kl'):g}", str(len(after)),
        ])  # fmt: skip
    said = f" The dense model: {spread(dense.values())}." if dense else ""
    made = [(row["config"]["finetune"]["converted"] or {}) for row in rows]
    shapes = {f"P={m['n_trees']} D={m['depth']}" for m in made if "depth" in m}
    shown = f" ({', '.join(sorted(shapes))})" if shapes else ""
    text = (
        f"Converted models{shown} trained further: {task(rows)}. "
        f"Validation loss without any dense layer, nats a token.{said} x dense: perplexity over that of "
        "the dense model of the seed, before and after; near: tokens of fine-tuning until it was below 1.02 "
        f"(empty: never). {origin(rows)}"
    )
    head = ["", "active share", "before", "after", "x dense, before", "x dense, after", "near", *others]
    steps = setting(rows[0], "train.steps")
    return block(
        f"Fine-tuning of converted models, {steps} steps", text, [*head, "lr", "weight", "seeds"], cells,
        last_of(lines), lines=lines,
    )  # fmt: skip


def other_texts(rows: list[dict]) -> list[str]:
    """Metrics of other texts, in nats a word."""
    return sorted({row["metric"] for row in rows if row["metric"].endswith("_nats_per_word")})
