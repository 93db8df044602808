"""Curves drawn from results rows: which points are on which line, and how far from dense they stand."""

import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

from experiments import record
from experiments.all_tables import read_rows
from experiments.curve_figures import CURVES, distances, figures, series
from experiments.curve_tables import Point
from experiments.tables import BEGIN, END
from tests.experiments.programs import call
from tests.experiments.test_tables import FFN, add, config

ROOT = pathlib.Path(__file__).parent.parent.parent
KINDS = {"dense": {}, "narrow": {}, "hash_tree_leak": {"leak": 1.0, "leak_share": 0.2}}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two lengths of three kinds, trees of a half of A and of twice F, and a second seed of one."""
    monkeypatch.setattr(record, "commit", lambda: "abc123")
    monkeypatch.setattr(record, "versions", lambda: {"jax": "0.10.2"})
    path = tmp_path / "results.jsonl"

    def run(row, loss, steps=500, seed=0, **ffn):
        kind = row.removesuffix("_leak")
        shape = {"kind": kind, "n_trees": 12, "top_k": 1, "renormalise": False, **FFN, **KINDS[row], **ffn}
        add(path, row, seed, table="quality_curves", of=config(steps=steps, **shape), loss=loss)

    for steps, dense, narrow, tree in ((500, 2.0, 3.0, 2.25), (1000, 1.0, 3.0, 0.5)):
        run("dense", dense, steps)
        run("narrow", narrow, steps)
        run("hash_tree_leak", tree, steps)
    run("dense", 2.0, seed=1)
    run("hash_tree_leak", 2.75, seed=1)
    run("hash_tree_leak", 2.4, depth=3, node_width=[12])
    run("narrow", 4.0, depth=3)
    run("hash_tree_leak", 2.1, depth=8, n_trees=11)
    return path


def test_a_point_is_its_loss_less_that_of_dense_seed_by_seed(rows):
    above = distances(read_rows(str(rows))[0])
    assert above[Point(500 * 8 * 256, 96, 96, "narrow")] == [1.0]
    assert above[Point(1000 * 8 * 256, 96, 3060, "hash_tree_leak100_20")] == [-0.5]
    assert set(above[Point(500 * 8 * 256, 3060, 3060, "dense")]) == {0.0}


def test_a_line_has_the_points_that_differ_in_its_axis_alone(rows):
    above = distances(read_rows(str(rows))[0])
    here = Point(500 * 8 * 256, 96, 3060, "dense")
    lines = {
        name: {line.label: line for line in series(curve, above, here)} for name, curve in CURVES.items()
    }
    tokens = lines["tokens"]
    assert set(tokens) == {"narrow", "dense", "hashed"}
    assert list(tokens["narrow"].x) == [1.024, 2.048] and list(tokens["narrow"].y) == [1.0, 2.0]
    # A line has the bars of its seeds.
    assert tokens["hashed"].error[0] > 0 and tokens["hashed"].error[1] == 0
    assert list(lines["units"]["hashed"].x) == pytest.approx([1, 11 * 511 / 3060])
    assert lines["units"]["hashed"].y[1] == pytest.approx(0.1)
    # Half of A has F of its own: on no line of F = dense's, but narrow's points are.
    assert set(lines["share"]) == {"narrow", "dense"}
    assert list(lines["share"]["narrow"].x) == pytest.approx([100 * 48 / 3060, 100 * 96 / 3060])
    assert list(lines["share"]["dense"].y) == [0.0, 0.0]


def test_the_figures_are_files_of_their_own(rows, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    where = (f"--results={rows}", f"--page={page}", f"--figures={tmp_path}")
    assert call("tables", "--check", *where).code == 1
    assert not list(tmp_path.glob("*.svg"))  # a check writes nothing
    assert call("tables", "--readme", *where) == (0, "", "")
    assert call("tables", "--check", *where).code == 0
    found = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in found] == ["curve_share.svg", "curve_tokens.svg", "curve_units.svg"]
    for path in found:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    found[0].write_text("old")
    done = call("tables", "--check", *where)
    assert done.code == 1 and "curve_share.svg" in done.err and "curve_units.svg" not in done.err


def test_a_directory_that_is_not_there_is_named(rows, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    done = call("tables", "--readme", f"--results={rows}", f"--page={page}", f"--figures={tmp_path}/none")
    assert done.code == 2 and done.err.count("\n") == 1 and "--figures" in done.err


def test_the_figures_of_docs_are_what_results_give():
    for name, svg in figures(read_rows(str(ROOT / "results" / "*.jsonl"))[0]).items():
        text = (ROOT / "docs" / f"curve_{name}.svg").read_text(encoding="utf-8")
        assert text == svg, "run python -m experiments.tables --readme"
