"""Scatters: every point is drawn where it belongs, told from the others, and its number stays legible."""

import itertools
import re

import numpy as np
import pytest

from tests.analysis.test_plots import SVG, parsed
from tree_ffn.analysis import axes, scatter
from tree_ffn.analysis.scatter import RADIUS, Point

CROWD = [Point(f"tree {i}", 16, 2.22 + 0.001 * i, kind=4) for i in range(12)]
DENSE = Point("dense", 510, 1.98, error=0.02)


def test_the_front_holds_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [Point(str(i), *pair) for i, pair in enumerate(rng.random((40, 2)))]
    front = scatter.pareto(points)
    for point in points:
        beaten = any(other.x <= point.x and other.y <= point.y and other != point for other in points)
        assert (point in front) == (not beaten)


def test_every_point_has_a_sign_a_number_and_its_bar():
    points = [Point("dense", 3060, 4.1), Point("a", 96, 4.3, error=0.1, kind=1), Point("b", 96, 4.4, kind=1)]
    figure = parsed(scatter.scatter("s", points, "units", "loss"))
    signs = [part for part in figure.iter() if part.attrib.get("class") == "sign"]
    assert [sign.find(f"{SVG}title").text.split(":")[0] for sign in signs] == ["dense", "a", "b"]
    assert [sign.attrib["fill"] for sign in signs] == ["var(--c0)", "var(--c1)", "var(--c1)"]
    assert [sign.tag for sign in signs] == [f"{SVG}circle", f"{SVG}polygon", f"{SVG}polygon"]
    numbers = [text for text in figure.iter(f"{SVG}text") if text.attrib.get("class") == "number"]
    assert [text.text for text in numbers] == ["1", "2", "3"]
    (bar,) = (line for line in figure.iter(f"{SVG}line") if line.attrib.get("class") == "bar")
    corners = [float(x) for x in re.findall(r"([\d.]+),", signs[1].attrib["points"])]
    assert float(bar.attrib["x1"]) == pytest.approx((min(corners) + max(corners)) / 2, abs=0.1)
    assert "units (log scale)" in [text.text for text in figure.iter(f"{SVG}text")]


def test_kinds_look_different_without_colour():
    shapes = {re.sub(r'fill="[^"]*"', "", scatter.marker(kind)) for kind in range(len(axes.LIGHT))}
    assert len(shapes) == len(axes.LIGHT) == len(scatter.SIGNS)


@pytest.mark.parametrize(
    "points", [[*CROWD, DENSE], [*CROWD[:6], *CROWD[:6], DENSE], [DENSE], [CROWD[0], CROWD[1]]]
)
def test_points_of_one_place_stand_apart_and_inside(points):
    frame, places = scatter.placed(points, "units", "loss")
    for (x, y), (u, v) in itertools.combinations(places, 2):
        assert abs(x - u) > 2 * RADIUS or abs(y - v) > 2 * RADIUS
    assert axes.LEFT + RADIUS < min(x for x, _ in places) <= max(x for x, _ in places) < frame.right - RADIUS
    for point in scatter.pareto(points):  # what the front goes through is where it was measured
        assert frame.px(point.x) in [x for x, _ in places]


@pytest.mark.parametrize("seed", range(4))
def test_numbers_cover_nothing(seed):
    rng = np.random.default_rng(seed)
    crowd = [(100 + 11.0 * i, 30 + y) for i, y in enumerate(rng.uniform(0, 12, 12))]
    places = crowd + [(x, y) for x, y in rng.uniform((260, 60), (400, 200), (8, 2))]
    numbers = scatter.number_places(places, [(y, y) for _, y in places])
    for one, other in itertools.combinations(numbers, 2):
        assert abs(one.x - other.x) >= (one.width + other.width) / 2 or abs(one.y - other.y) >= 12
    for number, (x, y) in itertools.product(numbers, places):
        assert abs(number.x - x) >= number.width / 2 + RADIUS or abs(number.y - y) >= 6 + RADIUS
    assert all(
        axes.LEFT < n.x - n.width / 2 and n.x + n.width / 2 < axes.WIDTH and 0 < n.y - 6 for n in numbers
    )
