"""Counts and heap indices, against a tree that is built node by node."""

import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import TreeShape
from tree_ffn.tree.shape import level_of, path_of

SHAPES = [(1, 0, 1), (3, 2, 4), (2, 3, (4, 1, 2, 3)), (1, 5, 1)]


@pytest.mark.parametrize("P, D, W", SHAPES)
def test_counts(P, D, W):
    shape = TreeShape(P, D, W)
    nodes = [(level, n) for level in range(D + 1) for n in range(2**level)]
    width = lambda level: W if isinstance(W, int) else W[level]
    units = sum(width(level) for level, _ in nodes)
    path = sum(width(level) for level in range(D + 1))
    assert shape.n_nodes == len(nodes) and shape.n_leaves == 2**D
    assert shape.n_deciding == sum(level < D for level, _ in nodes)
    assert (shape.tree_units, shape.path_units) == (units, path)
    assert (shape.total_units, shape.active_units) == (P * units, P * path)
    assert shape.active_share == (P * path) / (P * units)


@pytest.mark.parametrize("P, D, W", SHAPES)
def test_units_of_nodes(P, D, W):
    shape, spec = TreeShape(P, D, W), cases.make_spec(P=P, D=D, W=W)
    seen = []
    for node in range(shape.n_nodes):
        rows = oracle.rows_of(spec, node)
        assert list(shape.node_units(node)) == list(range(rows.start, rows.stop))
        seen += shape.node_units(node)
    assert seen == list(range(shape.tree_units))
    assert list(shape.router_units) == [shape.node_units(n)[0] for n in range(shape.n_deciding)]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_paths_and_leaves(depth):
    for leaf in range(2**depth):
        path = path_of(leaf, depth)
        assert path[0] == 0 and [level_of(n) for n in path] == list(range(depth + 1))
        assert all(child in (2 * n + 1, 2 * n + 2) for n, child in zip(path, path[1:]))
    assert sorted(path_of(leaf, depth)[-1] for leaf in range(2**depth)) == list(
        range(2**depth - 1, 2 ** (depth + 1) - 1)
    )


def test_a_list_of_widths_is_as_good_as_a_tuple():
    assert TreeShape(1, 1, [2, 3]) == TreeShape(1, 1, (2, 3)) and hash(TreeShape(1, 1, [2, 3]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_trees": 0}, "n_trees: 0 .*at least 1"),
        ({"n_trees": 1.5}, "n_trees: 1.5"),
        ({"n_trees": True}, "n_trees: True"),
        ({"depth": -1}, "depth: -1 .*at least 0"),
        ({"depth": 21}, "depth: 21 .*0 to 20"),
        ({"node_width": 0}, "node_width: 0"),
        ({"node_width": (1, 2)}, "node_width: .*2 widths.*3 levels"),
        ({"node_width": (1, 0, 2)}, "node_width: 0"),
    ],
)
def test_shapes_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        TreeShape(**({"n_trees": 1, "depth": 2} | fields))
