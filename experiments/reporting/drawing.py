"""Figures as SVG text, drawn by matplotlib: lines over time, scatters with a Pareto front, heat maps.

Colours are CSS custom properties in the end (`STYLE` gives them for light, dark and print), so one figure
reads on any of them; nothing needs a script. Every figure has a title that screen readers say.
"""

import contextlib
import importlib.util
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tree_ffn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# {name: its colour on light and on dark ground}. People of any colour vision tell the numbered ones apart
# (after Okabe and Ito).
COLOURS = {
    "ground": ("#ffffff", "#12161c"), "ink": ("#24292f", "#e6edf3"), "soft": ("#57606a", "#a9b3bd"),
    "rule": ("#d0d7de", "#3d444d"), "c0": ("#0b62c4", "#5aa9ff"), "c1": ("#b3440a", "#ff8a4c"),
    "c2": ("#00735c", "#2fc9a3"), "c3": ("#a0387e", "#f08cc8"), "c4": ("#7a5c00", "#e0bd4a"),
    "c5": ("#3c6e91", "#9cc7e6"), "c6": ("#5b4bb3", "#b3a6ff"), "c7": ("#454d57", "#c3c9d1"),
}  # fmt: skip
N_COLOURS = 8
_ON_LIGHT, _ON_DARK = (
    f":root{{{''.join(f'--{name}:{pair[i]};' for name, pair in COLOURS.items())}}}" for i in (0, 1)
)
STYLE = (
    f"{_ON_LIGHT}@media screen and (prefers-color-scheme:dark){{{_ON_DARK}}}"
    # What lies beneath a number does not touch it.
    "svg text{stroke:var(--ground);stroke-width:3px;paint-order:stroke}"
)
HEAT = "#3a86d8"  # on any ground: a picture's pixels have no properties
SIGNS = "os^PXDv*"
RADIUS = 3.5
WIDTH, HEIGHT = 448, 270  # of a figure, in points
SOFT, RULE = COLOURS["soft"][0], COLOURS["rule"][0]
LOOK = {
    "svg.fonttype": "none", "svg.hashsalt": "tree_ffn", "image.interpolation": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana"], "font.size": 11, "axes.labelsize": 11, "text.color": SOFT,
    "axes.labelcolor": SOFT, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "grid.color": RULE, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0, "axes.ymargin": 0,
    "axes.formatter.useoffset": False, "legend.frameon": False,
}  # fmt: skip


class Series(NamedTuple):
    """A line of a chart: its name, and its points; where panels say so, its colour and style."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None
    style: str = "-"


class Panel(NamedTuple):
    """One of several charts beside each other.

    Attributes:
      title: above it.
      y_label: name of its axis with units.
      lines: at least one.
      level: where there is one its axis is logarithmic, and a line stands there.
    """

    title: str
    y_label: str
    lines: Sequence[Series]
    level: float | None = None


class Point(NamedTuple):
    """A point of a scatter.

    Attributes:
      label: its name, which it says under a pointer.
      x, y: its values.
      error: the half height of its bar; 0 for none.
      kind: points of one number have one colour and sign.
    """

    label: str
    x: float
    y: float
    error: float = 0.0
    kind: int = 0


def check_installed(program: str) -> None:
    """Raises InputError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"{program}: needs the package matplotlib; `pip install 'tree_ffn[report]'` brings it."
        )


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, zero: bool = False
) -> str:
    """Lines, named beside the axes, which end where the data do.

    Args:
      title: what screen readers say.
      series: at least one; values that are not finite leave gaps.
      x_label, y_label: names of the axes with units.
      zero: the vertical axis begins at 0.
    """
    with _axes(x_label, y_label) as (figure, axes):
        for place, (label, x, y, *_) in enumerate(series):
            style = ("-", "--", ":", "-.")[place // N_COLOURS % 4]
            sign = "o" if np.isfinite(np.asarray(y, float)).sum() == 1 else ""
            axes.plot(x, y, style, marker=sign, color=_colour(place), label=label, clip_on=False)
        if zero:
            axes.set_ylim(bottom=0)
        if any(one.label for one in series):
            figure.legend(loc="outside right upper", ncols=1 + len(series) // 13, handlelength=1.2)
        return _svg(figure, title)


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points over a logarithmic axis with bars of their spread, numbered from 1 on, and the Pareto front.

    Args:
      title: what screen readers say.
      points: at least one.
      x_label, y_label: names of the axes with units.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    xs, ys = side_by_side(points), [point.y for point in points]
    with _axes(f"{x_label} (log scale)", y_label) as (figure, axes):
        axes.set(xscale="log", xmargin=0.05, ymargin=0.05)
        wide = max(xs) > 10 * min(xs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if wide else MaxNLocator(6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        front = [(xs[points.index(point)], point.y) for point in pareto(points)]
        axes.step(*zip(*front), "--", where="post", color=SOFT, linewidth=1)
        colours = [_colour(point.kind) for point in points]
        axes.errorbar(xs, ys, [point.error for point in points], fmt="none", ecolor=colours)
        for point, x, colour in zip(points, xs, colours):
            said = f"said {point.label}: {point.x:g}, {point.y:.4f}"
            axes.plot(
                x, point.y, SIGNS[point.kind % len(SIGNS)], color=colour, markersize=2 * RADIUS, gid=said
            )
        _number(figure, axes, list(zip(xs, ys)), colours)
        return _svg(figure, title)


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
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", [(HEAT, 0.0), (HEAT, 1.0)])
    with _axes(x_label, y_label) as (figure, axes):
        axes.grid(False)
        axes.imshow(values, shades, vmin=0, vmax=top, aspect="auto", extent=(0, 1, 1, 0))
        axes.set_xticks(*zip(*x_ticks))
        axes.set_yticks(*zip(*rows))
        return _svg(figure, title)


def panels(title: str, drawn: Sequence[Panel], x_label: str, ticks: Sequence[float]) -> str:
    """Charts beside each other, over one logarithmic axis; points say their values under a pointer.

    Args:
      title: what screen readers say.
      drawn: at least one.
      x_label: name of the axis below.
      ticks: its values.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(LOOK):
        figure = Figure((len(drawn) * 320 / 72, 430 / 72), dpi=72, layout="constrained")
        for place, panel in enumerate(drawn, 1):
            axes = figure.add_subplot(1, len(drawn), place, xscale="log")
            axes.set(xlabel=x_label, ylabel=panel.y_label, xmargin=0.05, ymargin=0.05)
            axes.set_title(panel.title, fontsize=11)
            axes.grid(axis="y", linewidth=0.8)
            axes.set_xticks(ticks, map("{:g}".format, ticks))
            if panel.level is not None:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.axhline(panel.level, color=SOFT, linewidth=1)
            axes.minorticks_off()
            for number, (label, x, y, colour, style) in enumerate(panel.lines):
                paint = _colour(number if colour is None else colour)
                axes.plot(x, y, style, color=paint, label=label)
                for at, value in zip(x, y):
                    gid = f"said {spoken(panel.title, label, at, value)}"
                    axes.plot(at, value, "o", color=paint, markersize=4, gid=gid)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), handlelength=2)
        return _svg(figure, title)


def spoken(panel: str, line: str, x: float, y: float) -> str:
    """What a point of `panels` says under a pointer.

    Args:
      panel: its title.
      line: its label.
      x: of the point.
      y: of the point.
    """
    return f"{panel}, {line}, {x:g}: {y:.4g}"


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


def side_by_side(points: Sequence[Point]) -> list[float]:
    """Where points of one x stand: the lowest at its place, so the front is right, the others at its right.

    Example:
      >>> [round(x, 1) for x in side_by_side([Point("a", 10, 2), Point("b", 10, 1), Point("c", 100, 1)])]
      [10.8, 10.0, 100.0]
    """
    lower = [sum(other.x == one.x and (other.y, j) < (one.y, i) for j, other in enumerate(points))
             for i, one in enumerate(points)]  # fmt: skip
    span = max(point.x for point in points) / min(point.x for point in points)
    step = max(span, 1.5) ** min(0.035, 0.4 / max(1, *lower))
    return [point.x * step**n for point, n in zip(points, lower)]


def _number(figure: "Figure", axes: "Axes", places: list[tuple[float, float]], colours: list[str]) -> None:
    """Writes the number of each point as near as it covers no sign and no other number."""
    figure.draw_without_rendering()  # from here on it is known where things are
    figure.set_layout_engine("none")
    signs = axes.transData.transform(places)
    middles, halves = signs, np.full_like(signs, RADIUS)
    away = np.outer(np.arange(12, 200, 6), np.exp(0.125j * np.pi * np.arange(16))).ravel()
    for number, (sign, colour) in enumerate(zip(signs, colours), 1):
        half = np.array([3.8 * len(str(number)) + 1, 7.0])
        tried = sign + np.stack([away.real, away.imag], 1)
        covers = (np.abs(tried[:, None] - middles) < halves + half).all(-1).any(-1)
        inside = (tried - half > axes.bbox.min).all(-1) & (tried + half < (WIDTH, HEIGHT)).all(-1)
        best = np.argmin(covers + 2 * ~inside)
        middles, halves = np.vstack([middles, tried[best]]), np.vstack([halves, half])
        line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkB": RADIUS}
        axes.annotate(
            str(number), sign, tried[best], "figure pixels", color=colour, weight="bold", ha="center",
            va="center", arrowprops=line if abs(away[best]) > 20 else None,
        )  # fmt: skip


def _colour(number: int) -> str:
    return COLOURS[f"c{number % N_COLOURS}"][0]


@contextlib.contextmanager
def _axes(x_label: str, y_label: str) -> Iterator[tuple["Figure", "Axes"]]:
    """An empty figure and its axes; until the context ends matplotlib draws as these figures look."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(axis="y", linewidth=0.8)
        yield figure, axes


def _svg(figure: "Figure", title: str) -> str:
    """The drawing as SVG inside HTML, in the page's colours."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    metadata = {"Title": title, **dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    for ground in (figure.patch, *(axes.patch for axes in figure.axes)):
        ground.set_facecolor("none")
    FigureCanvasSVG(figure).print_svg(file, metadata=metadata)  # `savefig` would draw it twice
    svg = file.getvalue()
    svg = re.sub(r'<g id="said (.*?)">', r"<g><title>\1</title>", svg[svg.index("<svg") :])
    svg = re.sub(r' id="[a-z0-9]+_\d+"', "", svg)  # a page has many figures
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", '<svg role="img" ', 1)


def alone(svg: str) -> str:
    """A figure as a file of its own: it brings its colours and its ground, so it reads on any page."""
    ground = f'<style>{STYLE}</style><rect width="100%" height="100%" rx="6" fill="var(--ground)"/>'
    return svg.replace("</title>", f"</title>{ground}", 1)
