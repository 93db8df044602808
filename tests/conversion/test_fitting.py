"""Where units stand, how routers are fitted, and what is solved for again, against slow checks."""

import itertools

import numpy as np
import pytest

from tests.conversion.layers import GROVE, LEAVES, PATHS, SHAPE, WIDTH, dense_layer, dense_output
from tests.leaf_oracle import ancestors
from tree_ffn.conversion import fit_routers, placement, refit
from tree_ffn.conversion.convert import Recipe, convert_layer, path_layer
from tree_ffn.conversion.targets import joined, output, place_gates, place_outputs, routed, target_of
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec
from tree_ffn.tree import LeafSpec, TreeShape
from tree_ffn.tree.shape import path_of


def test_units_may_be_left_out(rng):
    """Those that are used least, and only where that is asked for."""
    target = target_of(path_layer(TreeShape(n_trees=1, depth=2, node_width=(1, 1, 2))))
    x = rng.standard_normal((64, WIDTH)).astype(np.float32)
    energy = rng.random((20, 64)).astype(np.float32) * np.arange(1, 21, dtype=np.float32)[:, None] ** 4
    place = lambda method, drop: placement.place(method, target, x, energy, drop=drop)
    assert set(place("frequency", True)) == set(range(9, 20))
    found = place("cluster", True)
    assert len(set(found)) == 11 and 19 in found
    with pytest.raises(InputError, match="have room for 11 units, and the dense layer has 20; .* or leave"):
        place("cluster", False)


@pytest.mark.parametrize("method", placement.METHODS)
@pytest.mark.parametrize("layer", [LEAVES, GROVE], ids=["one_tree", "two_trees"])
@pytest.mark.parametrize("n_units", [32, 29, 3])
def test_every_unit_has_one_place_in_leaves(method, layer, n_units, rng):
    """Experts share none; what is left over stays empty."""
    energy = rng.random((n_units, 64)).astype(np.float32)
    x = rng.standard_normal((64, WIDTH)).astype(np.float32)
    found = placement.place(method, target_of(layer), x, energy)
    assert sorted(found) == [-1] * (32 - n_units) + list(range(n_units))


def test_a_split_is_in_halves(rng):
    left, right, goes_right = placement.split(
        rng.standard_normal((50, WIDTH)).astype(np.float32), rng.random((7, 50)).astype(np.float32), rng
    )
    assert len(left) == 4 and sorted([*left, *right]) == list(range(7)) and goes_right.shape == (50,)


def test_the_most_used_units_are_on_top(rng):
    energy = rng.random((26, 40)).astype(np.float32)
    order = np.argsort(-energy.sum(axis=1))
    found = placement.place("frequency", target_of(PATHS), np.zeros((40, WIDTH), np.float32), energy)
    found = found.reshape(SHAPE.n_trees, -1)
    assert set(found[:, 0]) == set(order[:2]) and set(found[:, 1:5].ravel()) == set(order[2:10])


def test_experts_of_paths_are_the_units_on_them():
    target = target_of(path_layer(TreeShape(n_trees=2, depth=3, node_width=(1, 2, 1, 2))))
    shape = target.spec.shape
    want = [
        [tree * shape.tree_units + u for node in path_of(leaf, 3) for u in shape.node_units(node)]
        for tree in range(2)
        for leaf in range(8)
    ]
    np.testing.assert_array_equal(target.experts, want)


def test_routers_of_paths_find_the_best_leaf_where_there_is_one(rng):
    """Leaves that are worth something in one corner of the input each."""
    x = rng.standard_normal((512, 2)).astype(np.float32)
    corner = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    w, threshold = fit_routers.fit_tree(x, np.eye(4, dtype=np.float32)[:, corner])
    node = (x @ w[0] > threshold[0]).astype(int)
    leaf = 2 * node + ((x * w[1 + node]).sum(axis=1) > threshold[1 + node])
    assert (leaf == corner).mean() > 0.95


def test_routers_of_a_beam_are_fitted_to_the_best_values(rng):
    """Node by node: what of the K best positive values lies on either side, in the order of rows."""
    value = rng.standard_normal((16, 50)).astype(np.float32)
    spec = LeafSpec(n_experts=16, expert_width=1, top_k=12, n_trees=2)
    want = np.zeros((2, 14, 50))
    for t in range(50):
        for j in sorted(range(16), key=lambda j: -value[j, t])[:12]:
            for row, right in ancestors(spec, j):
                want[int(right), row, t] += max(value[j, t], 0)
    right, left = fit_routers.shares_below(value, n_trees=2, top_k=12)
    np.testing.assert_allclose(right, want[1], rtol=1e-6)
    np.testing.assert_allclose(left, want[0], rtol=1e-6)


def test_a_beam_finds_the_best_leaves_where_they_are_told_apart(rng):
    """Two of eight leaves are worth something, by the corner that a token is in."""
    x = rng.standard_normal((1024, 2)).astype(np.float32)
    corner = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    value = np.repeat(np.eye(4, dtype=np.float32)[:, corner], 2, axis=0)
    layer = LeafSpec(n_experts=8, expert_width=1, top_k=2, gate_norm="rms")
    params = target_of(layer).fitted({}, x, value, 0)
    ids, gates = routed(params, layer, x)
    assert (ids // 2 == corner[:, None]).all(axis=1).mean() > 0.95
    assert np.abs(gates - 1).max() < 0.1


def test_a_router_is_the_minimum_of_its_objective(rng):
    """No nearby decision is better, by the objective written out in float64; each of several by itself."""
    x = rng.standard_normal((200, 5)).astype(np.float32)
    sides = rng.random((2, 3, 200)) * (rng.random((2, 3, 200)) < 0.5)
    sides[0] *= np.exp(x @ rng.standard_normal((5, 3))).T  # what is right is told by the input
    w, b = fit_routers.fit_routers(x, *sides, ridge=2.0)
    x = x.astype(np.float64)

    def objective(n, w, b):
        r, (right, left) = x @ w + b, sides[:, n] / sides[:, n].sum(axis=0).mean()
        prior = 2.0 * x.var(axis=0).mean() * w @ w + 0.02 * (x.mean(axis=0) @ w + b) ** 2
        return right @ np.logaddexp(0, -r) + left @ np.logaddexp(0, r) + prior / 2

    for n in range(3):
        best = objective(n, w[n], b[n])
        for step, sign in itertools.product(np.eye(6), (-0.05, 0.05)):
            assert objective(n, w[n] + sign * step[:5], b[n] + sign * step[5]) > best
    nothing, zero = fit_routers.fit_router(np.float32(x), np.zeros(200))
    assert not nothing.any() and zero == 0


def test_a_decision_goes_where_it_gains(rng):
    x = rng.standard_normal((200, 5)).astype(np.float32)
    gain = x @ rng.standard_normal(5) + 0.5 + 0.3 * rng.standard_normal(200)
    w, threshold = fit_routers.fit_router(x, gain)
    assert ((x @ w > threshold) == (gain > 0)).mean() > 0.8


def test_output_weights_are_least_squares(rng):
    """The solution in float64 of the problem with the prior as further rows."""
    h = (rng.standard_normal((200, 7)) * (rng.random((200, 7)) < 0.5)).astype(np.float32)
    h[:, 6] = 0  # never visited
    y, w0 = rng.standard_normal((200, 3)).astype(np.float32), rng.standard_normal((7, 3)).astype(np.float32)
    w, b = refit.solve_outputs(h, y, w0)
    visits = np.maximum((h != 0).sum(axis=0), 1)
    prior = np.diag(np.sqrt(refit.PRIOR * (h.astype(np.float64) ** 2).sum(axis=0) / visits + 1e-12))
    rows = np.block([[h, np.ones((200, 1))], [prior, np.zeros((7, 1))]])
    want = np.linalg.lstsq(rows, np.concatenate([y, prior @ w0]), rcond=None)[0]
    np.testing.assert_allclose(np.vstack([w, b]), want, atol=1e-4)
    np.testing.assert_array_equal(w[6], w0[6])


def converted(layer, rng):
    """(target, params, x, y, errors of given experts) of a layer that was refitted."""
    dense, spec = dense_layer(rng, 26), DenseSpec(26)
    x = rng.standard_normal((40, WIDTH)).astype(np.float32)
    y = dense_output(dense, x)
    params, _ = convert_layer(dense, spec, x, x, Recipe(layer, "random", refits=1))
    target = target_of(layer)
    errors = lambda ids: np.square(refit.output_at(target, params, x, ids) - y).sum(axis=1)
    return target, params, x, y, errors


def test_the_value_of_a_path_is_the_error_that_it_takes_away(rng):
    """Against every path tried in turn."""
    target, params, x, y, errors = converted(PATHS, rng)
    ids, _ = routed(params, PATHS, x)
    np.testing.assert_allclose(refit.output_at(target, params, x, ids), output(params, PATHS, x), atol=1e-4)
    values, J = refit.values(target, params, x, y, group=1), SHAPE.n_leaves
    tried = [errors(np.stack([ids[:, 0], np.full(40, J + leaf)], axis=1)) for leaf in range(J)]
    np.testing.assert_allclose(values - values[0], tried[0] - np.stack(tried), atol=1e-3, rtol=1e-3)
    assert errors(refit.best_experts(target, params, x, y)).sum() < errors(ids).sum()


@pytest.mark.parametrize("layer", [LEAVES, GROVE], ids=["one_tree", "two_trees"])
def test_the_value_of_a_leaf_is_the_error_that_it_takes_away(layer, rng):
    """Of one that is chosen against the same without it, of others with it too."""
    target, params, x, y, _ = converted(layer, rng)
    ids, gates = routed(params, layer, x)
    h, w = place_outputs(params, layer, x), joined(params, "w_out")
    values, size = refit.values(target, params, x, y, group=0), np.sqrt(np.square(gates).mean())
    there = h * place_gates(params, layer, ids, gates)
    error = lambda there: np.square(y - params["b_out"] - there @ w).sum(axis=1)
    for expert, places in enumerate(target.experts):
        without, added = there.copy(), there.copy()
        without[:, places] = 0
        added[:, places] = size * h[:, places]
        np.testing.assert_allclose(values[expert], error(without) - error(added), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layer", [LEAVES, GROVE], ids=["one_tree", "two_trees"])
def test_the_best_leaves_are_the_best_in_turn(layer, rng):
    """Each of a token's K gives way to the best one given the others, from the first to the last."""
    target, params, x, y, errors = converted(layer, rng)
    want = routed(params, layer, x)[0].copy()
    for slot in range(layer.top_k):
        tried = []
        for expert in range(layer.n_experts):
            ids = want.copy()
            ids[:, slot] = expert
            taken = (np.delete(want, slot, axis=1) == expert).any(axis=1)
            ids[taken] = want[taken]  # ids are distinct
            tried.append(np.where(taken, np.inf, errors(ids)))
        want[:, slot] = np.argmin(tried, axis=0)
    np.testing.assert_array_equal(refit.best_experts(target, params, x, y), want)
