"""Curves of quality: how the gap moves with tokens seen, with F at one A, and with A / F."""

from typing import Any, NamedTuple

from experiments.lines import (
    by_seed,
    check_same,
    differences,
    groups,
    machine,
    origin,
    paired,
    setting,
    spread,
    task,
)  # fmt: skip
from experiments.page import Table
from tree_ffn.models.build import ffn_spec
from tree_ffn.models.ffn import units
from tree_ffn.models.moe import MoESpec
from tree_ffn.training.config import namespace
from tree_ffn.training.leak import leaks
from tree_ffn.tree import TreeSpec

# Rows of T1, and of the attempts at its protocol, through which the curves go.
MEETING = {
    "t1_small": ("dense", "narrow_A96", "moe_top1_X32", "moe_top4_X128", "tree_straight_P12_W1"),
    "quality_attempts": (
        "moe_top1_X32_leak100_20",
        "moe_top4_X128_leak100_20",
        "hash_X32_leak100_20",
        "hash_tree_P12_W1_leak100_20",
        "hash_tree_P9_D9_S6_leak100_20",
        "tree_straight_P12_W1_leak100_20",
        "tree_straight_P9_D9_S6_leak100_20",
        "tree_continuous_P24_D5_experts_leak100_20",
        "tree_continuous_P24_D6_experts_leak100_20",
        "tree_continuous_P24_D7_experts_leak100_20",
        "moe_top4_X128_sum1_leak100_20",
        "tree_continuous_P96_D5_experts_norm2_leak100_20",
        "tree_continuous_P96_D6_experts_norm2_leak100_20",
        "tree_continuous_P96_D7_experts_norm2_leak100_20",
        "tree_continuous_P96_D5_experts_norm2_beam2_leak100_20",
    ),
}


class Point(NamedTuple):
    """What the runs of a line were: tokens seen, A, F, and the kind of layer; lines stand in this order."""

    tokens: int
    active: int
    total: int
    kind: str


def point_of(row: dict) -> Point:
    """The point of a run.

    Kinds are told apart by how decisions are made and learned, not by shape.
    """
    ffn: Any = namespace(row["config"]["ffn"])
    kind = f"moe_top{ffn.top_k}" if ffn.kind == "moe" else ffn.kind
    if kind == "tree":
        hashed = ffn.hash_levels
        kind += f"_{ffn.routing.partition('_')[0]}" + (f"_hash{hashed}" if hashed else "")
    spec = ffn_spec(ffn, ffn.kind)
    if isinstance(spec, (TreeSpec, MoESpec)) and spec.renormalise:
        kind += f"_norm{spec.gate_norm}"
    if isinstance(spec, TreeSpec) and spec.beam > 1:
        kind += f"_beam{spec.beam}"
    if leaks(spec):
        kind += f"_leak{100 * spec.leak:.0f}_{100 * spec.leak_share:.0f}"
    train, model = (row["config"][part] for part in ("train", "model"))
    seen = train["steps"] * train["batch_size"] * model["context"]
    total, active = units(spec)
    return Point(seen, active, total, kind)


def trained_text(row: dict) -> tuple:
    """Runs of one device on one text."""
    return machine(row), setting(row, "data.sha256")


def meeting_point(rows: list[dict], measured: list[dict]) -> list[dict]:
    """Rows of T1 and of attempts at its protocol, of the same text, device and model."""
    return [
        row
        for row in measured
        if row["row"] in MEETING.get(row["table"], ())
        and trained_text(row) == trained_text(rows[0])
        and not differences([rows[0]["config"], row["config"]], r"model\.(context|width|n_layers)$")
    ]


def quality_curves(rows: list[dict]) -> Table:
    """A line a point: gap closed between the narrow layer of its A and the dense one of its tokens."""
    lines = groups(rows, point_of)
    for point, line in lines.items():
        check_same(f"{point.kind} of A = {point.active}, F = {point.total}", line)
    losses = {point: by_seed(line, "val_loss") for point, line in lines.items()}
    cells = []
    for point in lines:
        cells.append([
            f"`{point.kind}`", f"{point.tokens / 1e6:,.0f} M", f"{point.active:,}", f"{point.total:,}",
            f"{point.active / point.total:.1%}", spread(losses[point].values()), gap_at(losses, point),
            str(len(losses[point])),
        ])  # fmt: skip
    text = (
        f"How the gap moves around T1-small's point, {task(rows)}. Gap closed is `(narrow-x)/(narrow-dense)` "
        "of validation loss, seed by seed: narrow of the line's own A, both of its own tokens. "
        f"{origin(rows)}"
    )
    head = ["", "tokens", "A", "F", "A / F", "val loss", "gap closed", "seeds"]
    commands = tuple(line[-1]["command"] for line in lines.values())
    return Table(f"Curves of quality, {machine(rows[0])}", text, head, cells, 1, commands)


def gap_at(losses: dict[Point, dict], point: Point) -> str:
    """Gap closed by a line; 0 and 1 at its ends, empty where one of them is missing."""
    ends = {"narrow": "0", "dense": "1"}
    if point.kind in ends:
        return ends[point.kind]
    at = [other for other in losses if other.tokens == point.tokens]
    narrow = [other for other in at if other.kind == "narrow" and other.active == point.active]
    dense = [other for other in at if other.kind == "dense"]
    if not (narrow and dense):
        return ""
    share = lambda x, n, d: (n - x) / (n - d)
    return spread(paired(share, *(losses[where] for where in (point, narrow[0], dense[0]))), ".3f")
