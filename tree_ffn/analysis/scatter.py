"""Scatters with a Pareto front: points of one kind look alike, and each has a number that nothing covers.

Names do not fit beside crowded points, so a point has a number there and its name in a key (`marker` draws
the key's signs). Where numbers would cover each other they stand further off, with a line to their point.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from tree_ffn.analysis.axes import BOTTOM, HEIGHT, LEFT, LIGHT, WIDTH, Axes, figure

# Corners of the signs in units of their radius; None is a disc. Those of neighbours differ in form too.
SIGNS = (
    None,
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),  # square
    ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),  # triangle
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),  # diamond
    ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),  # triangle, upside down
    ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
     (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),  # plus
    ((-1.2, 0), (-0.6, -1.05), (0.6, -1.05), (1.2, 0), (0.6, 1.05), (-0.6, 1.05)),  # hexagon
    ((-1.1, -1.1), (0, -0.4), (1.1, -1.1), (0.4, 0), (1.1, 1.1), (0, 0.4), (-1.1, 1.1), (-0.4, 0)),  # star
)  # fmt: skip
RADIUS = 4.5
MARGIN, SIDE = 14, 24.0  # right of the axis, where no names stand; within it, beside the outermost points
APART, CROWD = 13.0, 120.0  # between points of one x side by side, and at most between the first and the last


class Point(NamedTuple):
    """A point of a scatter.

    Attributes:
      label: its name in the key, and what it says under a pointer.
      x, y: its values.
      error: the half height of its bar; 0 for none.
      kind: points of one number have one colour and sign.
    """

    label: str
    x: float
    y: float
    error: float = 0.0
    kind: int = 0


class Place(NamedTuple):
    """Where a number stands: its middle, and how wide it is."""

    x: float
    y: float
    width: float


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both x and y (smaller is better), by ascending x.

    Example:
      >>> [p.label for p in pareto([Point("a", 1, 3), Point("b", 2, 2), Point("c", 3, 2.5)])]
      ['a', 'b']
    """
    best, front = math.inf, []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if point.y < best:
            front.append(point)
            best = point.y
    return front


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points over a logarithmic axis with bars of their spread, numbered from 1 on, and the Pareto front.

    Args:
      title: what screen readers say.
      points: at least one.
      x_label, y_label: names of the axes with units.
    """
    axes, places = placed(points, x_label, y_label)
    ends = [(axes.py(point.y + point.error), axes.py(point.y - point.error)) for point in points]
    front = [places[points.index(point)] for point in pareto(points)]
    steps = "".join(f"{'H' if i else 'M'}{x:.1f}{'V' if i else ' '}{y:.1f}" for i, (x, y) in enumerate(front))
    parts = [axes.frame(), f'<path class="front" d="{steps}"/>']
    for point, (x, _), (top, bottom) in zip(points, places, ends):
        bar = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"'
        parts += [f'<line class="bar" {bar} stroke="{colour(point.kind)}"/>'] if point.error else []
    numbers = number_places(places, ends)
    for (x, y), to in zip(places, numbers):
        if math.hypot(to.x - x, to.y - y) > 1.5 * RADIUS + to.width:
            away = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to.x:.1f}" y2="{to.y:.1f}"'
            parts.append(f'<line class="lead" {away}/>')
    for point, (x, y) in zip(points, places):
        parts.append(marker(point.kind, x, y, said=f"{point.label}: {point.x:g}, {point.y:.4f}"))
    for i, (point, to) in enumerate(zip(points, numbers), 1):
        where = f'x="{to.x:.1f}" y="{to.y + 4:.1f}" text-anchor="middle"'
        parts.append(f'<text class="number" {where} style="fill:{colour(point.kind)}">{i}</text>')
    return figure(title, "".join(parts))


def placed(points: Sequence[Point], x_label: str, y_label: str) -> tuple[Axes, list[tuple[float, float]]]:
    """Axes with room for all points beside each other, and where the points stand."""
    ys = [y for point in points for y in (point.y - point.error, point.y + point.error)]
    room = 0.0
    while True:
        axes = Axes(
            [point.x for point in points], ys, x_label, y_label,
            log_x=True, right=MARGIN, beside=(SIDE, SIDE + room),
        )  # fmt: skip
        places = [(axes.px(point.x), axes.py(point.y)) for point in points]
        places = [(x + shift, y) for (x, y), shift in zip(places, dodge(places))]
        beyond = max(x for x, _ in places) - (axes.right - SIDE)
        if beyond < 0.5 or room > 2 * CROWD:
            return axes, places
        room += beyond  # what is drawn closer may stand side by side with more


def colour(kind: int) -> str:
    """The colour of a kind, one for light and dark and print."""
    return f"var(--c{kind % len(LIGHT)})"


def marker(kind: int, x: float = 0.0, y: float = 0.0, said: str = "") -> str:
    """The sign of a kind at a place of a drawing; `said` shows where a pointer rests on it."""
    corners, look = SIGNS[kind % len(SIGNS)], f'class="sign" fill="{colour(kind)}"'
    if corners is None:
        tag, shape = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"'
    else:
        places = " ".join(f"{x + RADIUS * a:.1f},{y + RADIUS * b:.1f}" for a, b in corners)
        tag, shape = "polygon", f'points="{places}"'
    title = f"<title>{html.escape(said)}</title>" if said else ""
    return f"<{tag} {look} {shape}>{title}</{tag}>"


def dodge(places: Sequence[tuple[float, float]]) -> list[float]:
    """How far to shift points to the right so that those of one x stand beside each other.

    The lowest stays: so the front is where it was measured, and what it beats is at its right.

    Example:
      >>> dodge([(10.0, 1.0), (50.0, 1.0), (10.0, 2.0)])
      [13.0, 0.0, 0.0]
    """
    groups: dict[int, list[int]] = {}
    for i, (x, _) in enumerate(places):
        groups.setdefault(round(x), []).append(i)
    shifts = [0.0] * len(places)
    for group in groups.values():
        step, _ = _step(len(group))
        for k, i in enumerate(sorted(group, key=lambda i: (places[i][0], -places[i][1]))):
            shifts[i] = step * k
    return shifts


def _step(n: int) -> tuple[float, float]:
    """From one of n points of one x to the next, and from the first to the last: a crowd stands closer."""
    width = min(APART * (n - 1), CROWD)
    return width / max(n - 1, 1), width


def number_places(points: Sequence[tuple[float, float]], bars: Sequence[tuple[float, float]]) -> list[Place]:
    """Where the number of each point stands: as near as it covers no other number, sign or bar.

    Args:
      points: places of the signs in the drawing.
      bars: (top, bottom) of the bar of each.
    """
    found: dict[int, Place] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        width = 7.0 * len(str(i + 1)) + 2
        tried = (
            Place(
                points[i][0] + (far + width / 2 - 4) * math.cos(turn),
                points[i][1] + far * math.sin(turn),
                width,
            )
            for far in (11, 16, 22, 29, 37, 46, 56, 67)
            for turn in (
                math.pi * (k / 8 - 0.25) for k in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8)
            )
        )
        found[i] = min(tried, key=lambda place: _cost(place, i, points, bars, found))
    return [found[i] for i in range(len(points))]


def _cost(place: Place, own: int, points, bars, found: dict[int, Place]) -> float:
    """How bad a place of a number is: what it covers, what its line crosses, how far it is."""
    x, y = points[own]
    half = place.width / 2
    inside = LEFT + half < place.x < WIDTH - half and 7 < place.y < HEIGHT - BOTTOM - 7
    cost = math.hypot(place.x - x, place.y - y) + (0 if inside else 1000)
    for other, to in found.items():
        covers = abs(to.x - place.x) < half + to.width / 2 and abs(to.y - place.y) < 12
        cost += 300 * covers + 40 * _cross((x, y), place[:2], points[other], to[:2])
    for k, (px, py) in enumerate(points):
        near = abs(px - place.x) < half + RADIUS and abs(py - place.y) < 6 + RADIUS
        cost += 200 * near + (40 * (_distance((px, py), (x, y), place[:2]) < RADIUS) if k != own else 0)
        top, bottom = bars[k]
        cost += 15 * (abs(px - place.x) < half + 1 and top - 6 < place.y < bottom + 6 and bottom > top)
    return cost


def _cross(a, b, c, d) -> bool:
    """Whether the lines a-b and c-d cross."""
    side = lambda p, q, r: (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _distance(p, a, b) -> float:
    """From p to the line a-b."""
    (ax, ay), (dx, dy) = a, (b[0] - a[0], b[1] - a[1])
    along = min(max(((p[0] - ax) * dx + (p[1] - ay) * dy) / (dx * dx + dy * dy), 0), 1)
    return math.hypot(p[0] - ax - along * dx, p[1] - ay - along * dy)
