"""Figures: where things are drawn, in which colours, and that they are well-formed."""

import base64
import io
import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from experiments.reporting import drawing
from experiments.reporting.drawing import Point, Series
from tests.experiments.programs import call

pytest.importorskip("matplotlib", reason="figures need matplotlib; the extra report brings it")
SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
CROWD = [Point(f"tree {i}", 16, 2.22 + 0.001 * i, kind=4) for i in range(12)]
DENSE = Point("dense", 510, 1.98, error=0.02)


def lines(svg):
    """The lines in the colours of series, as arrays of points."""
    paths = ElementTree.fromstring(svg).iter(f"{SVG}path")
    drawn = [
        path.attrib["d"] for path in paths if "fill: none; stroke: var(--c" in path.attrib.get("style", "")
    ]
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in drawn]


def signs(svg):
    """{what a sign says under a pointer: its place}."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    said = {group.find(f"{SVG}title"): group for group in groups}
    uses = {title.text: next(group.iter(f"{SVG}use")) for title, group in said.items() if title is not None}
    return {said: (float(use.attrib["x"]), float(use.attrib["y"])) for said, use in uses.items()}


def test_lines_go_through_their_points_and_the_axes_end_there():
    svg = drawing.line_chart("a & b", [Series("x<y", [0, 50, 100], [1.0, 3.0, 2.0])], "step", "nats")
    figure = ElementTree.fromstring(svg)
    assert figure.find(f"{SVG}title").text == "a & b"
    texts = [text.text for text in figure.iter(f"{SVG}text")]
    assert {"x<y", "step", "nats", "0", "100", "1.00", "3.00"} <= set(texts)
    (x0, y0), (x1, y1), (x2, y2) = lines(svg)[0]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 < y2 < y0  # larger values stand higher
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2)


def test_values_that_are_not_finite_leave_gaps():
    svg = drawing.line_chart("t", [Series("", [0, 1, 2, 3, 4], [1, 2, np.nan, 2, 1])], "x", "y")
    assert svg.count("M ", svg.index("var(--c0)") - 200, svg.index("var(--c0)")) == 2
    single = drawing.line_chart("t", [Series("", [5], [1.0])], "x", "y")
    assert any("var(--c0)" in use.attrib["style"] for use in ElementTree.fromstring(single).iter(f"{SVG}use"))
    ElementTree.fromstring(drawing.line_chart("t", [Series("", [], [])], "x", "y", zero=True))


def test_panels_share_an_axis_and_their_points_say_what_they_are():
    loss = drawing.Panel("Loss", "nats", [Series("tree", [1, 6, 96], [4.3, 4.28, 4.31])])
    time = drawing.Panel("cpu", "multiple", [Series("use", [1, 96], [2.0, 0.5], 3, "--")], level=1.0)
    svg = drawing.panels("a & b", [loss, time], "W", [1, 6, 96])
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert [texts.count(text) for text in ("W", "96", "tree", "use", "Loss", "cpu")] == [2, 2, 1, 1, 1, 1]
    places = signs(svg)
    assert list(places) == [
        "Loss, tree, 1: 4.3", "Loss, tree, 6: 4.28", "Loss, tree, 96: 4.31",
        "cpu, use, 1: 2", "cpu, use, 96: 0.5",
    ]  # fmt: skip
    assert places["Loss, tree, 6: 4.28"][1] > places["Loss, tree, 96: 4.31"][1]
    halfway = (places["Loss, tree, 6: 4.28"][0] - places["Loss, tree, 1: 4.3"][0]) / (
        places["Loss, tree, 96: 4.31"][0] - places["Loss, tree, 1: 4.3"][0]
    )
    assert halfway == pytest.approx(np.log(6) / np.log(96), abs=0.01)
    assert "var(--c3)" in svg and "var(--c0)" in svg and "var(--c1)" not in svg


def test_colours_are_those_of_the_page():
    series = [Series(str(i), [0, 1], [i, 0]) for i in range(drawing.N_COLOURS + 1)]
    svg = drawing.line_chart("t", series, "x", "y")
    assert set(re.findall(r"--\w+", svg)) == {*(f"--c{i}" for i in range(8)), "--soft", "--rule"}
    assert not re.findall(r"(?:fill|stroke): ?(?!var|none)\S+", svg)
    assert all(f"--{name}:{dark}" in drawing.STYLE for name, (_, dark) in drawing.COLOURS.items())


def test_a_figure_of_its_own_brings_its_colours():
    figure = ElementTree.fromstring(
        drawing.alone(drawing.line_chart("a & b", [Series("", [0], [1])], "x", "y"))
    )
    title, style, ground, *_ = figure
    assert title.text == "a & b" and figure.attrib["width"]
    assert "--ground" in style.text and ground.attrib["fill"] == "var(--ground)"


def test_the_front_holds_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [Point(str(i), *pair) for i, pair in enumerate(rng.random((40, 2)))]
    front = drawing.pareto(points)
    for point in points:
        beaten = any(other.x <= point.x and other.y <= point.y and other != point for other in points)
        assert (point in front) == (not beaten)


def test_every_point_has_a_sign_a_number_and_its_bar():
    points = [Point("dense", 3060, 4.1), Point("a<", 96, 4.3, error=0.1, kind=1), Point("b", 96, 4.4, kind=1)]
    svg = drawing.scatter("s", points, "units", "loss")
    places = signs(svg)
    assert list(places) == ["dense: 3060, 4.1000", "a<: 96, 4.3000", "b: 96, 4.4000"]
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"1", "2", "3", "units (log scale)"} <= set(texts)
    bars = [line for line in lines(svg) if len(line) == 2 and np.ptp(line[:, 1]) > 1]
    (x, y), ((bar_x, low), (_, high)) = places["a<: 96, 4.3000"], bars[0]
    assert bar_x == pytest.approx(x, abs=0.1) and (low + high) / 2 == pytest.approx(y, abs=0.1)


def test_kinds_look_different_without_colour():
    assert len(set(drawing.SIGNS)) == drawing.N_COLOURS == len(drawing.SIGNS)


@pytest.mark.parametrize(
    "points", [[*CROWD, DENSE], [*CROWD[:6], *CROWD[:6], DENSE], [DENSE], [CROWD[0], CROWD[1]]]
)
def test_points_of_one_place_stand_apart(points):
    named = [point._replace(label=str(i)) for i, point in enumerate(points)]
    places = signs(drawing.scatter("s", named, "units", "loss")).values()
    for (x, y), (u, v) in itertools.combinations(places, 2):
        assert abs(x - u) > 2 * drawing.RADIUS or abs(y - v) > 2 * drawing.RADIUS
    xs = drawing.side_by_side(points)
    for point in drawing.pareto(points):  # what the front goes through is where it was measured
        assert xs[points.index(point)] == point.x


@pytest.mark.parametrize("seed", range(4))
def test_numbers_cover_nothing(seed):
    rng = np.random.default_rng(seed)
    points = CROWD + [
        Point(str(i), 10**x, y) for i, (x, y) in enumerate(rng.uniform((1, 2), (3, 2.3), (15, 2)))
    ]
    svg = drawing.scatter("s", points, "units", "loss")
    bold = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if "700" in text.attrib["style"]]
    assert [text.text for text in bold] == [str(i + 1) for i in range(len(points))]
    # A text's place is on its base line, 4 below its middle.
    numbers = [(float(t.attrib["x"]), float(t.attrib["y"]) - 4, 3.5 * len(t.text)) for t in bold]
    for (x, y, half), (u, v, other) in itertools.combinations(numbers, 2):
        assert abs(x - u) >= half + other or abs(y - v) >= 12
    for (x, y, half), (u, v) in itertools.product(numbers, signs(svg).values()):
        assert abs(x - u) >= half + drawing.RADIUS or abs(y - v) >= 6 + drawing.RADIUS
    assert all(0 < x - half and x + half < drawing.WIDTH and 0 < y < drawing.HEIGHT for x, y, half in numbers)


def test_a_heat_map_holds_its_values():
    from matplotlib.image import imread

    values = np.array([[0.0, 0.5, 1.0], [2.0, 0.25, 0.0]])
    svg = drawing.heat_map("h", values, "step", "leaf", [(0.5, "9")], [(0.25, "tree 0")], top=1.0)
    figure = ElementTree.fromstring(svg)
    assert {"9", "tree 0", "step", "leaf"} <= {text.text for text in figure.iter(f"{SVG}text")}
    (image,) = figure.iter(f"{SVG}image")
    data = base64.b64decode(image.attrib[HREF].partition(",")[2])
    shade = imread(io.BytesIO(data))[..., 3]
    upright = shade[::-1] if "scale(1 -1)" in image.attrib["transform"] else shade
    np.testing.assert_allclose(upright, np.clip(values, 0, 1), atol=0.01)


@pytest.mark.parametrize("program", ["report", "quickstart"])
def test_a_missing_package_is_named(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    to = [f"--to={tmp_path}/x.html", "--workdir=docs"] if program == "report" else []
    outcome = call(program, *to)
    assert outcome.code == 2 and not outcome.out
    assert (
        f"{program}: needs the package matplotlib; `pip install 'tree_ffn[report]'` brings it." in outcome.err
    )
