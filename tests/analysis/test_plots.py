"""Figures: where things are drawn, and that they are well-formed."""

import base64
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest

from tree_ffn.analysis import axes, plots
from tree_ffn.analysis.plots import Series

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    """The figure as a tree; SVG inside HTML has no name space."""
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_lines_go_through_their_points():
    svg = plots.line_chart("a & b", [Series("x<y", [0, 50, 100], [1.0, 3.0, 2.0])], "step", "nats")
    figure = parsed(svg)
    assert figure.attrib["aria-label"] == "a & b" and figure.find(f"{SVG}title").text == "a & b"
    (line,) = figure.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = ([float(v) for v in p.split(",")] for p in line.attrib["points"].split())
    assert x0 == axes.LEFT and x2 == axes.WIDTH - axes.RIGHT and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0  # larger values stand higher
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2)
    assert "x<y" in [text.text for text in figure.iter(f"{SVG}text")]


def test_values_that_are_not_finite_leave_gaps():
    svg = plots.line_chart("t", [Series("", [0, 1, 2, 3, 4], [1, 2, np.nan, 2, 1])], "x", "y")
    assert len(list(parsed(svg).iter(f"{SVG}polyline"))) == 2
    single = plots.line_chart("t", [Series("", [5], [1.0])], "x", "y")
    assert len(list(parsed(single).iter(f"{SVG}circle"))) == 1
    assert parsed(plots.line_chart("t", [Series("", [], [])], "x", "y")) is not None


def test_measured_points_have_bars_within_the_frame():
    lines = [Series("a", [1, 10, 100], [1.0, 3.0, 2.0], [0.0, 1.5, 0.0], colour=3), Series("b", [1], [0.5])]
    figure = parsed(plots.line_chart("t", lines, "x", "y", measured=True))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in figure.iter(f"{SVG}circle")]
    assert len(circles) == 4
    assert circles[1][0] == pytest.approx((circles[0][0] + circles[2][0]) / 2, abs=0.1)  # powers of ten
    bars = [path.attrib["d"] for path in figure.iter(f"{SVG}path")]
    low, height = (float(v) for v in bars[1].partition(",")[2].split("v"))
    assert low + height / 2 == pytest.approx(circles[1][1], abs=0.1)
    unit = (circles[0][1] - circles[2][1]) / (2.0 - 1.0)
    assert abs(height) == pytest.approx(2 * 1.5 * unit, abs=0.2)
    assert min(low, low + height) >= axes.TOP and max(low, low + height) <= axes.HEIGHT - axes.BOTTOM
    assert [line.attrib["stroke"] for line in figure.iter(f"{SVG}polyline")] == ["var(--c3)", "var(--c1)"]


def test_a_figure_of_its_own_brings_its_colours():
    figure = ElementTree.fromstring(axes.alone(axes.figure("a & b", "<g/>")))
    title, style, ground, body = figure
    assert (title.text, body.tag) == ("a & b", f"{SVG}g")
    assert "--ground" in style.text and ground.attrib["fill"] == "var(--ground)"


@pytest.mark.parametrize("low,high", [(0, 1), (130, 610), (1.97, 2.9), (0, 37_000), (-3, 3), (1e-5, 9e-5)])
def test_ticks_are_few_round_and_inside(low, high):
    found = axes.ticks(low, high)
    assert 3 <= len(found) <= 8 and min(found) >= low - 1e-9 and max(found) <= high + 1e-9
    step = found[1] - found[0]
    assert round(step / 10.0 ** np.floor(np.log10(step) + 1e-9), 6) in (1, 2, 5)


@pytest.mark.parametrize("wishes", [[50, 50, 50], [0, 1, 99, 100], [10], list(range(0, 100, 3))])
def test_labels_do_not_cover_each_other(wishes):
    placed = axes.spread_out([(float(y), str(y), "") for y in wishes], 12, 0, 100)
    places = [y for y, *_ in placed]
    room = min(12, 100 / max(len(wishes) - 1, 1))
    assert all(b - a >= room - 1e-6 for a, b in zip(places, places[1:]))
    assert min(places) >= -1e-6 and max(places) <= 100 + 1e-6
    assert [int(text) for _, text, _ in placed] == sorted(wishes)


def test_a_heat_map_holds_its_values():
    values = np.array([[0.0, 0.5, 1.0], [2.0, 0.25, 0.0]])
    svg = plots.heat_map("h", values, "step", "leaf", [(0.5, "9")], [(0.25, "tree 0")], top=1.0)
    (image,) = parsed(svg).iter(f"{SVG}image")
    data = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    length = struct.unpack(">I", data[33:37])[0]
    pixels = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(2, 4)[:, 1:]
    np.testing.assert_array_equal(pixels, [[0, 128, 255], [255, 64, 0]])
