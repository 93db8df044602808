"""Draws how far layers end from the dense one: against tokens seen, A / F, and F.

`python -m experiments.tables --readme` writes the figures, docs/curve_*.svg. Their points are those of the
table "Curves of quality" (experiments/curve_tables.py), of which a figure has the kinds that `SHOWN` names.
Drawn is the validation loss less the dense layer's of as many tokens, a mean over seeds: 0 is dense, below 0
is better. Bars are standard deviations over seeds; most points have one.
"""

from collections.abc import Callable
from typing import NamedTuple

from experiments.curve_tables import Point, meeting_point, point_of, trained_text
from experiments.lines import by_seed, groups, middle, paired
from tree_ffn.analysis.axes import alone
from tree_ffn.analysis.plots import Series, line_chart

# Kinds of layers in the figures, as `point_of` calls them, and their names there.
SHOWN = {
    "narrow": "narrow",
    "dense": "dense",
    "moe_top4_norm1_leak100_20": "mixture",
    "hash_tree_leak100_20": "hashed",
    "tree_continuous_norm2_leak100_20": "no beam",
    "tree_continuous_norm2_beam2_leak100_20": "the recipe",
}


class Curve(NamedTuple):
    """A figure.

    Attributes:
      title: what screen readers say.
      x_label: name of the horizontal axis.
      x: of a point, beside `here`: T1-small's length, A, and the dense layer's F.
      fixed: fields of a point that have to be about those of `here`.
    """

    title: str
    x_label: str
    x: Callable[[Point, Point], float]
    fixed: tuple[str, ...]


ACTIVE = 96
CURVES = {
    "tokens": Curve(
        "Distance from dense against tokens seen", "million tokens seen",
        lambda point, here: point.tokens / 1e6, ("active", "total"),
    ),
    "share": Curve(
        "Distance from dense against active units", "active units, % of dense's",
        lambda point, here: 100 * point.active / here.total, ("tokens", "total"),
    ),
    "units": Curve(
        "Distance from dense against units in store", "units in store, times dense's",
        lambda point, here: point.total / here.total, ("tokens", "active"),
    ),
}  # fmt: skip
# A narrow layer has no more units than it uses, a dense one uses all: these fields of theirs say nothing.
EXCUSED = {"narrow": "total", "dense": "active"}


def figures(measured: list[dict]) -> dict[str, str]:
    """{name: SVG} of every curve that rows of table `quality_curves` have at least two points of."""
    mine = groups((row for row in measured if row["table"] == "quality_curves"), trained_text)
    drawn = {}
    for rows in mine.values():
        above = distances(rows + meeting_point(rows, measured))
        lengths = [point for point in above if point.kind == "dense"]
        if not lengths:
            continue
        # T1-small's own length is that of which most is known.
        dense = max(lengths, key=lambda end: sum(point.tokens == end.tokens for point in above))
        here = dense._replace(active=ACTIVE)
        for name, curve in CURVES.items():
            if lines := series(curve, above, here):
                drawn[name] = alone(line_chart(curve.title, lines, curve.x_label, Y_LABEL, measured=True))
    return drawn


Y_LABEL = "nats a token above dense"


def distances(rows: list[dict]) -> dict[Point, list[float]]:
    """Validation loss of each point less the dense layer's of as many tokens, a value a seed."""
    losses = {point: by_seed(line, "val_loss") for point, line in groups(rows, point_of).items()}
    dense = {point.tokens: loss for point, loss in losses.items() if point.kind == "dense"}
    found = {
        point: paired(lambda x, d: x - d, loss, dense[point.tokens])
        for point, loss in losses.items()
        if point.tokens in dense
    }
    return {point: values for point, values in found.items() if values}


def series(curve: Curve, above: dict[Point, list[float]], here: Point) -> list[Series]:
    """A curve's lines, those of one place left out; where dense is one of these it is a line at 0."""
    lines, n_dense = [], list(SHOWN).index("dense")
    for colour, (kind, label) in enumerate(SHOWN.items()):
        points = [point for point in above if point.kind == kind and belongs(point, curve, here)]
        points.sort(key=lambda point: curve.x(point, here))
        xs = [curve.x(point, here) for point in points]
        if len(set(xs)) > 1:
            ys, errors = zip(*(middle(above[point]) for point in points))
            lines.append(Series(label, xs, ys, errors, colour))
    if lines and all(line.colour != n_dense for line in lines):
        reach = [x for line in lines for x in line.x]
        lines.append(Series(SHOWN["dense"], [min(reach), max(reach)], [0.0, 0.0], colour=n_dense))
    return lines


def belongs(point: Point, curve: Curve, here: Point) -> bool:
    """Whether a point differs from `here` in the curve's x alone, but for what shapes do not allow."""
    fields = set(curve.fixed) - {EXCUSED.get(point.kind)}
    return all(abs(getattr(point, name) / getattr(here, name) - 1) <= 0.05 for name in fields)
