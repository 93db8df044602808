"""The frame of a figure: colours, axes with round numbers, labels that do not cover each other."""

import html
import math

import numpy as np

WIDTH, HEIGHT = 448, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 84, 14, 40
# Told apart by people of any colour vision (after Okabe and Ito), and dark or light enough for their ground.
LIGHT = ("#0b62c4", "#b3440a", "#00735c", "#a0387e", "#7a5c00", "#3c6e91", "#5b4bb3", "#454d57")
DARK = ("#5aa9ff", "#ff8a4c", "#2fc9a3", "#f08cc8", "#e0bd4a", "#9cc7e6", "#b3a6ff", "#c3c9d1")

STYLE = (
    ":root{--ground:#ffffff;--ink:#24292f;--soft:#57606a;--rule:#d0d7de;--heat:#0b62c4;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
    + "}@media screen and (prefers-color-scheme:dark){:root{--ground:#12161c;--ink:#e6edf3;--soft:#a9b3bd;"
    + "--rule:#3d444d;--heat:#5aa9ff;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))
    + "}}svg text{fill:var(--soft);font:12px Helvetica,Arial,sans-serif}svg .rule{stroke:var(--rule)}"
    "svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .front{stroke:var(--soft);"
    "stroke-dasharray:4 3;fill:none}svg .lead{stroke:var(--soft);stroke-width:.7}"
    # What lies beneath a number or a sign does not touch it.
    "svg .number{font-weight:bold;stroke:var(--ground);stroke-width:3px;paint-order:stroke}"
    "svg .sign{stroke:var(--ground);stroke-width:.8}"
)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high].

    Example:
      >>> ticks(0.0, 1.0), ticks(130, 610)
      ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [200.0, 300.0, 400.0, 500.0, 600.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A tick's text.

    Example:
      >>> shown(0.2), shown(200.0), shown(30000.0), shown(0.0005)
      ('0.2', '200', '30k', '5e-4')
    """
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


class Axes:
    """From values to places, and the frame around them.

    Args:
      xs, ys: all values that are to be drawn.
      x_label, y_label: names of the axes with units.
      log_x: the horizontal axis is logarithmic, and says so.
      zero: the vertical axis begins at 0.
      right: room at the right, for names at the ends of lines.
      beside: room left and right of the outermost values of a logarithmic axis.
    """

    def __init__(
        self, xs, ys, x_label: str, y_label: str, *, log_x: bool = False, zero: bool = False,
        right: float = RIGHT, beside: tuple[float, float] = (40.0, 40.0),
    ):  # fmt: skip
        self.log_x, self.labels = log_x, (f"{x_label} (log scale)" if log_x else x_label, y_label)
        self.right = WIDTH - right
        xs = np.log10(xs) if log_x else np.asarray(xs, float)
        if log_x and len(xs) and xs.min() == xs.max():  # from a half to twice the one value
            xs = np.array([xs[0] - 0.3, xs[0] + 0.3])
        self.x = _range(xs, zero=False, margin=0.0)
        if log_x:
            low, high = self.x
            scale = (high - low) / (self.right - LEFT - sum(beside))
            self.x = low - beside[0] * scale, high + beside[1] * scale
        self.y = _range(np.asarray(ys, float), zero=zero, margin=0.05)

    def px(self, value: float) -> float:
        low, high = self.x
        value = math.log10(value) if self.log_x else value
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def frame(self) -> str:
        right, bottom = self.right, HEIGHT - BOTTOM
        parts = []
        for value in ticks(*self.y):
            y = self.py(value)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(value)}</text>')
        for value in self._x_ticks():
            x = self.px(value)
            parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{shown(value)}</text>')
        x_label, y_label = map(html.escape, self.labels)
        middle = (LEFT + right) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{x_label}</text>')
        parts.append(
            f'<text transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
            f"{y_label}</text>"
        )
        return "".join(parts)

    def _x_ticks(self) -> list[float]:
        if not self.log_x:
            return ticks(*self.x)
        low, high = self.x
        if high - low < 0.5:  # less than half a power of ten: round numbers as on a linear axis
            return ticks(10**low, 10**high)
        factors = (1, 3) if high - low > 1.5 else (1, 2, 5)
        places = [f * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for f in factors]
        return [value for value in places if low <= math.log10(value) <= high]


def _range(values: np.ndarray, zero: bool, margin: float) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    room = margin * (high - low)
    return (low if zero and low == 0 else low - room), high + room


def figure(title: str, body: str) -> str:
    """The whole SVG; `title` is what screen readers say."""
    said = html.escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
    return f"{head}<title>{said}</title>{body}</svg>"


def alone(svg: str) -> str:
    """A figure as a file of its own: it brings its colours and its ground, so it reads on any page.

    Example:
      >>> alone(figure("none", "")).count("xmlns")
      1
    """
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    ground = f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="var(--ground)"/>'
    head, title, body = svg.partition("</title>")
    return f"{head.replace('<svg', f'<svg {size}', 1)}{title}{ground}{body}\n"


def spread_out(ends: list[tuple[float, str, str]], apart: float, low: float, high: float) -> list[tuple]:
    """Labels moved up and down until they stand `apart`, in their order; as near as that allows.

    Example:
      >>> spread_out([(50.0, "a", ""), (52.0, "b", "")], 10, 0, 100)
      [(46.0, 'a', ''), (56.0, 'b', '')]
    """
    ends = sorted(ends)
    apart = min(apart, (high - low) / max(len(ends) - 1, 1))
    blocks: list[list] = []  # [middle of the wishes, how many]
    for y, *_ in ends:
        blocks.append([min(max(y, low), high), 1])
        while len(blocks) > 1 and _bottom(blocks[-2], apart, low, high) + apart > _top(
            blocks[-1], apart, low, high
        ):
            middle, n = blocks.pop()
            before, m = blocks[-1]
            blocks[-1] = [(before * m + middle * n) / (m + n), m + n]
    places = [_top(block, apart, low, high) + i * apart for block in blocks for i in range(block[1])]
    return [(y, *rest) for y, (_, *rest) in zip(places, ends)]


def _top(block, apart, low, high):
    middle, n = block
    return min(max(middle - apart * (n - 1) / 2, low), high - apart * (n - 1))


def _bottom(block, apart, low, high):
    return _top(block, apart, low, high) + apart * (block[1] - 1)
