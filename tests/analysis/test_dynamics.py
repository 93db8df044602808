"""Figures over time against plain loops over nodes, and against a run's own metrics."""

import math
import shutil

import numpy as np
import pytest

from tests.training.tiny import tiny_config
from tree_ffn.analysis import dynamics
from tree_ffn.analysis.dynamics import OverTime
from tree_ffn.errors import InputError
from tree_ffn.training.loop import train

VISITS = np.random.default_rng(0).integers(0, 9, (4, 3, 8)) * np.array([1, 1, 0, 0, 1, 1, 1, 0])


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """The workdir of a real run: a dense layer, then a layer of trees; validations at steps 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("run")
    changes = {"model__layers": "dense,tree", "ffn__node_width": (1, 1, 1, 2), "train__probe": True}
    config = tiny_config(texts, steps=8, **changes)
    train(config, str(workdir), log=lambda _: None, bar=False)
    return workdir


def per_node(visits):
    """{(sample, tree, level, place): visits} by walking every leaf's path up."""
    found = {}
    for (sample, tree, leaf), count in np.ndenumerate(visits):
        for level in range(4):
            key = sample, tree, level, leaf >> (3 - level)
            found[key] = found.get(key, 0) + count
    return found


def test_decisions_by_level():
    nodes, got = per_node(VISITS), dynamics.decisions(VISITS)
    assert got.right.shape == (4, 3)
    for sample in range(4):
        for level in range(3):
            pairs = [
                (nodes[sample, tree, level + 1, 2 * place], nodes[sample, tree, level + 1, 2 * place + 1])
                for tree in range(3)
                for place in range(2**level)
            ]
            total = sum(left + right for left, right in pairs)
            assert got.right[sample, level] == pytest.approx(sum(right for _, right in pairs) / total)
            assert got.skew[sample, level] == pytest.approx(sum(abs(r - l) for l, r in pairs) / total)
            constant = sum(l + r for l, r in pairs if not (l and r))
            assert got.constant[sample, level] == pytest.approx(constant / total)


def test_entropy_and_dead_leaves():
    visits = np.array([[[4, 4, 4, 4]], [[8, 0, 8, 0]], [[0, 0, 0, 0]]])
    np.testing.assert_allclose(dynamics.leaf_entropy(visits), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(dynamics.dead_leaves(visits), [0.0, 0.5, 1.0])
    no_depth = np.array([[[5]]])
    assert dynamics.leaf_entropy(no_depth).tolist() == [0.0]
    assert dynamics.decisions(no_depth).right.shape == (1, 0)


def test_gradient_by_level_and_side():
    norms = np.random.default_rng(1).random((2, 3, 7))
    got = dynamics.gradient_by_side(norms)
    assert got.shape == (2, 3, 2)
    for sample in range(2):
        assert got[sample, 0, 0] == got[sample, 0, 1] == pytest.approx(math.hypot(*norms[sample, :, 0]))
        for level, first in ((1, 1), (2, 3)):
            for side in (0, 1):  # children 2n + 1 are left, 2n + 2 right
                mine = [
                    norms[sample, :, n] for n in range(first, 2 * first + 1) if (n % 2 == 0) == bool(side)
                ]
                assert got[sample, level, side] == pytest.approx(np.linalg.norm(mine))


def test_units_by_level():
    values = np.arange(2 * 10).reshape(1, 2, 10)
    levels = dynamics.by_unit_level(values, (2, 1, 1 + 0))
    assert [level.shape for level in levels] == [(1, 2, 2), (1, 2, 2), (1, 2, 4)]
    assert levels[1][0, 1].tolist() == [12, 13]
    assert dynamics.ever_working(np.array([[[0.0, 0.2, 0.02, 1.0]]]), 0.01).tolist() == [0.75]


def layer(shares, steps, validations):
    moved = np.zeros((len(steps), 1, 3))
    moved[:, 0, -1] = shares
    visits = np.zeros((len(validations), 1, 4))
    return {
        ("valid", "moved"): OverTime(np.array(steps), moved),
        ("valid", "visits"): OverTime(np.array(validations), visits),
    }


def test_moves_do_not_depend_on_how_often_one_looks():
    often = layer([0.1, 0.1], [100, 200], [0, 100, 200])
    np.testing.assert_allclose(dynamics.moves(often).values, 0.1)
    seldom = layer([1 - 0.9**2], [200], [0, 200])  # two independent chances to move
    np.testing.assert_allclose(dynamics.moves(seldom).values, 0.1)
    assert dynamics.moves(layer([1.0], [50], [0, 50])).values.tolist() == [1.0]


@pytest.mark.parametrize(
    "shares,expected",
    [
        ([0.5, 0.04, 0.03, 0.01], 200),
        ([0.5, 0.04, 0.06, 0.01], 400),  # it thawed once more
        ([0.5, 0.4, 0.3, 0.2], None),
        ([0.0, 0.0, 0.0, 0.0], 100),
    ],
)
def test_freeze_step(shares, expected):
    assert dynamics.freeze_step(layer(shares, [100, 200, 300, 400], [0, 100, 200, 300, 400])) == expected


@pytest.mark.slow
def test_a_run_says_the_same(run):
    usage = dynamics.load_usage(str(run))
    assert list(usage) == [1]
    arrays = usage[1]
    lines = [line for line in dynamics.read_lines(str(run), "metrics.jsonl") if line["split"] == "valid"]
    steps, visits = arrays["valid", "visits"]
    assert steps.tolist() == [line["step"] for line in lines] == [3, 6, 8]
    for name, values in (("dead_leaves", dynamics.dead_leaves), ("leaf_entropy", dynamics.leaf_entropy)):
        np.testing.assert_allclose(values(visits), [line[f"{name}/1"] for line in lines], rtol=1e-5)
    moved = arrays["valid", "moved"]
    assert moved.steps.tolist() == [6, 8]
    expected = [line["changed/1"] for line in lines[1:]]
    np.testing.assert_allclose(moved.values[:, :, -1].mean(axis=1), expected, rtol=1e-5)
    per = dynamics.by_unit_level(arrays["valid", "working"].values, (1, 1, 1, 2))
    assert [level.shape for level in per] == [(3, 2, 1), (3, 2, 2), (3, 2, 4), (3, 2, 16)]
    working = sum(level.sum(axis=(1, 2)) for level in per)
    np.testing.assert_allclose(working, [line["working_units/1"] for line in lines], rtol=1e-2)  # float16
    share = dynamics.ever_working(arrays["valid", "peak"].values, 0.01)
    np.testing.assert_allclose(share, [line["ever_working/1"] for line in lines], atol=0.02)
    sides = dynamics.gradient_by_side(arrays["valid", "gradient"].values) ** 2
    share = sides[:, 1:, 1].sum(axis=1) / sides[:, 1:].sum(axis=(1, 2))
    np.testing.assert_allclose(share, [line["gradient_right/1"] for line in lines], rtol=1e-4)


def test_a_torn_last_line_is_left_out_and_another_is_said(run, tmp_path):
    whole = (run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert len(dynamics.read_lines(str(tmp_path), "metrics.jsonl")) == len(whole.splitlines()) - 1
    (tmp_path / "metrics.jsonl").write_text(whole[20:])
    with pytest.raises(InputError, match="line 1 is no JSON"):
        dynamics.read_lines(str(tmp_path), "metrics.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        dynamics.read_lines(str(tmp_path / "nowhere"), "metrics.jsonl")


@pytest.mark.parametrize("damage", [lambda content: content[:-200], lambda content: b"", lambda _: b"a line"])
def test_a_damaged_file_of_usage_is_said(run, tmp_path, damage):
    assert dynamics.load_usage(str(tmp_path)) == {}
    shutil.copytree(run / "usage", tmp_path / "usage")
    path = next((tmp_path / "usage").iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        dynamics.load_usage(str(tmp_path))
