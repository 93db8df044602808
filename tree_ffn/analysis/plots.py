"""Figures as SVG text: lines over time, and heat maps; scatters are in scatter.py.

Colours are CSS custom properties (`axes.STYLE` gives them for light, dark and print), so one figure reads on
any of them; nothing needs a script. Every figure has a title that screen readers say.
"""

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tree_ffn.analysis.axes import BOTTOM, HEIGHT, LEFT, LIGHT, RIGHT, TOP, WIDTH, Axes, figure, spread_out


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
      label: its name.
      x, y: its points.
      error: half heights of the bars at its points; empty for none.
      colour: a number; None is the line's place in the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    colour: int | None = None


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, zero: bool = False,
    measured: bool = False,
) -> str:  # fmt: skip
    """Lines, each with its name at its right end.

    Args:
      title: what screen readers say.
      series: at least one; values that are not finite leave gaps.
      x_label, y_label: names of the axes with units.
      zero: the vertical axis begins at 0.
      measured: few points, each measured by itself: they are drawn, with their bars, and the horizontal axis
        is logarithmic.

    Example:
      >>> "polyline" in line_chart("loss", [Series("a", [0, 1], [3.0, 2.0])], "step", "nats a token")
      True
    """
    xs, ys = (np.concatenate([np.asarray(values, float) for values in group]) for group in _columns(series))
    bars = [
        np.add(one.y, np.multiply(sign, one.error)) for one in series if len(one.error) for sign in (-1, 1)
    ]
    ys = np.concatenate([ys, *bars])
    axes = Axes(xs, ys, x_label, y_label, zero=zero, log_x=measured, beside=(14.0, 14.0))
    parts, ends = [axes.frame()], []
    for place, one in enumerate(series):
        i = place if one.colour is None else one.colour
        colour = f"var(--c{i % len(LIGHT)})"
        dash = f' stroke-dasharray="{6 - i // len(LIGHT)} 3"' if i >= len(LIGHT) else ""
        runs = _finite_runs(one)
        for run in runs:
            places = " ".join(f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y in run)
            parts.append(f'<polyline class="line" stroke="{colour}"{dash} points="{places}"/>')
            if measured or len(run) == 1:
                parts += [dot(axes.px(x), axes.py(y), colour, radius=2.5) for x, y in run]
        for x, y, error in zip(one.x, one.y, one.error):
            half = axes.py(y - error) - axes.py(y)
            bar = f"M{axes.px(x):.1f},{axes.py(y) - half:.1f}v{2 * half:.1f}"
            parts.append(f'<path class="line" stroke="{colour}" d="{bar}"/>')
        if runs:
            ends.append((axes.py(runs[-1][-1][1]), one.label, colour))
    for y, label, colour in spread_out(ends, 13, TOP + 4, HEIGHT - BOTTOM + 4):
        style = f'style="fill:{colour}"'
        parts.append(f'<text x="{WIDTH - RIGHT + 5}" y="{y + 4:.1f}" {style}>{html.escape(label)}</text>')
    return figure(title, "".join(parts))


def dot(x: float, y: float, colour: str, radius: float = 4, said: str = "") -> str:
    """A point at a place of the drawing; `said` shows where a pointer rests on it."""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"'
    return f"<circle {place}><title>{html.escape(said)}</title></circle>" if said else f"<circle {place}/>"


def _columns(series: Sequence[Series]) -> tuple[list, list]:
    return [one.x for one in series], [one.y for one in series]


def _finite_runs(one: Series) -> list[list[tuple[float, float]]]:
    """The line's pieces between values that are not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.x, one.y):
        if math.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def heat_map(
    title: str, values: np.ndarray, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]],
    rows: Sequence[tuple[float, str]], top: float,
) -> str:  # fmt: skip
    """A matrix as shades of one colour, from none at 0 to full at `top`.

    Args:
      title: what screen readers say.
      values: [rows, columns], at least 0; rows from the top.
      x_label, y_label: names of the axes.
      x_ticks: (place from 0 to 1, text) below.
      rows: (place from 0 to 1, text) at the left.
      top: the value of the full colour.
    """
    right, bottom = WIDTH - 12, HEIGHT - BOTTOM
    box = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"'
    shade = np.clip(values / max(top, 1e-30), 0, 1)
    parts = [
        # A mask of grey values lets the page's own colour through: dark and print need no other picture.
        f'<mask id="{_name(title)}"><image {box} preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{png(shade)}"/></mask>'
        f'<rect {box} fill="var(--heat)" mask="url(#{_name(title)})"/>'
        f'<rect {box} fill="none" class="rule"/>'
    ]
    for place, text in x_ticks:
        x = LEFT + place * (right - LEFT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{html.escape(text)}</text>')
    for place, text in rows:
        y = TOP + place * (bottom - TOP)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{html.escape(text)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    return figure(title, "".join(parts))


def _name(title: str) -> str:
    """A name for an element, the same for the same title."""
    return f"m{zlib.crc32(title.encode()):08x}"


def png(shade: np.ndarray) -> str:
    """A matrix of [0, 1] as a grey PNG in a data URI."""
    grey = np.round(255 * np.asarray(shade)).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in grey)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()
