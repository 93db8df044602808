"""Dense layers into trees, against slow checks: what a visited unit is, what is kept, and who decides how."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.conversion import convert, fit_routers, placement, refit
from tree_ffn.conversion.convert import Recipe, convert_layer, convert_model
from tree_ffn.conversion.refit import run_trees
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec, Transformer
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.tree import TreeShape
from tree_ffn.tree.shape import path_of

SHAPE = TreeShape(n_trees=2, depth=2, node_width=(1, 2, 2))
WIDTH = 8


def dense_layer(rng, n_units: int) -> dict:
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"w_in": normal(n_units, WIDTH), "b_in": normal(n_units), "w_out": normal(n_units, WIDTH),
            "b_out": normal(WIDTH)}  # fmt: skip


def gelu(z):
    return z * (1 + np.vectorize(math.erf)(z / np.sqrt(2))) / 2


def output(params, spec, x):
    return run_trees(params, spec, x)[0]


@pytest.mark.parametrize("method", placement.METHODS)
@pytest.mark.parametrize("router", convert.ROUTERS)
def test_a_visited_unit_is_the_dense_unit(method, router, rng):
    """Token by token, by the layer's definition: only rows of the dense layer add to the output."""
    n_units = 20 if router == "spent" else 26
    dense, recipe = dense_layer(rng, n_units), Recipe(SHAPE, method, router, refits=0)
    x, held = rng.standard_normal((2, 96, WIDTH)).astype(np.float32)
    params, _ = convert_layer(dense, DenseSpec(n_units), x, held, recipe)
    rows = {row.tobytes(): f for f, row in enumerate(dense["w_in"])}
    got = output(params, convert.tree_spec(DenseSpec(n_units), recipe), held)
    found = [rows.get(row.tobytes()) for row in params["w_in"].reshape(-1, WIDTH)]
    assert sorted(f for f in found if f is not None) == list(range(n_units))  # every unit once
    for t in range(0, 96, 7):
        visited = []
        for p in range(SHAPE.n_trees):
            node = 0
            for level in range(SHAPE.n_levels):
                for u in SHAPE.node_units(node):
                    visited.append(rows.get(params["w_in"][p, u].tobytes()))
                if level < SHAPE.depth:
                    first = SHAPE.node_units(node)[0]
                    if router == "spent":
                        r = held[t] @ params["w_in"][p, first] + params["b_in"][p, first]
                        assert not params["w_out"][p, first].any()
                    else:
                        r = held[t] @ params["router"]["w"][p, node] - params["threshold"][p, node]
                    node = 2 * node + 1 + int(r > 0)
        visited = [f for f in visited if f is not None]
        assert len(visited) == len(set(visited)) <= SHAPE.active_units
        z = dense["w_in"][visited] @ held[t] + dense["b_in"][visited]
        np.testing.assert_allclose(
            got[t], gelu(z) @ dense["w_out"][visited] + params["b_out"], atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("shape", [
    TreeShape(n_trees=1, depth=0, node_width=12),
    TreeShape(n_trees=3, depth=0, node_width=4),
])  # fmt: skip
def test_where_all_units_are_visited_nothing_is_lost(shape, rng):
    dense, spec = dense_layer(rng, 12), DenseSpec(12, "relu")
    x = rng.standard_normal((64, WIDTH)).astype(np.float32)
    for method in placement.METHODS:
        params, shares = convert_layer(dense, spec, x, x, Recipe(shape, method))
        want = np.maximum(x @ dense["w_in"].T + dense["b_in"], 0) @ dense["w_out"] + dense["b_out"]
        np.testing.assert_allclose(
            output(params, convert.tree_spec(spec, Recipe(shape, method)), x), want, atol=1e-4
        )
        assert min(shares) > 1 - 1e-6


def clustered_layer(rng, n_groups=4, per_group=4):
    """Units that work for one group of tokens only; tokens of that group, in random order."""
    centres = 4 * np.eye(n_groups, WIDTH, dtype=np.float32)
    group = np.repeat(np.arange(n_groups), per_group)
    order = rng.permutation(len(group))
    dense = dense_layer(rng, len(group))
    dense["w_in"] = (centres[group] + 0.3 * rng.standard_normal((len(group), WIDTH)))[order].astype(
        np.float32
    )
    dense["b_in"] = np.full(len(group), -6, np.float32)
    tokens = lambda n: (centres[rng.integers(0, n_groups, n)] + 0.3 * rng.standard_normal((n, WIDTH))).astype(
        np.float32
    )
    return dense, tokens(512), tokens(256)


def test_known_clusters_are_found(rng):
    """Four groups, four leaves: the tree sends every token to its group's units, and random ones do not."""
    dense, x, held = clustered_layer(rng)
    spec = DenseSpec(16, "relu")
    shape = TreeShape(n_trees=1, depth=2, node_width=(1, 1, 4))
    recipe = lambda method, router: Recipe(shape, method, router, refits=0)
    share = lambda method, router: convert_layer(dense, spec, x, held, recipe(method, router))[1].tree
    # Nodes above take a unit each where routers stand apart, and an odd rest parts into unequal halves.
    for router, least in (("spent", 0.97), ("separate", 0.85)):
        assert share("cluster", router) > least
        assert share("random", router) < least - 0.2


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_no_method_beats_the_oracle(activation, rng):
    shape = TreeShape(n_trees=2, depth=3, node_width=1)
    dense, spec = dense_layer(rng, shape.total_units), DenseSpec(shape.total_units, activation)
    x, held = rng.standard_normal((2, 512, WIDTH)).astype(np.float32)
    recipe = lambda method: Recipe(shape, method, refits=0)
    found = {m: convert_layer(dense, spec, x, held, recipe(m))[1] for m in placement.METHODS}
    for shares in found.values():
        assert shares.oracle > max(shares.paths, shares.static) and shares.paths > shares.tree
        assert (shares.oracle, shares.static) == (found["random"].oracle, found["random"].static)


@pytest.mark.slow
@pytest.mark.parametrize("router", convert.ROUTERS)
def test_solving_for_output_weights_keeps_more(router, rng):
    """On held-out tokens, and more with routers fitted to the error; what units read stays as it was."""
    shape = TreeShape(n_trees=2, depth=3, node_width=(1, 1, 1, 2))
    dense, spec = dense_layer(rng, 32), DenseSpec(32)
    x, held = rng.standard_normal((2048, WIDTH)), rng.standard_normal((512, WIDTH))
    layer = lambda refits: convert_layer(
        dense, spec, np.float32(x), np.float32(held), Recipe(shape, "cluster", router, refits=refits)
    )
    (plain, kept_0), (once, kept_1), (again, kept_2) = map(layer, range(3))
    assert kept_0.tree + 0.1 < kept_1.tree < kept_2.tree < kept_2.paths
    assert kept_0.static < kept_1.static and kept_0.oracle < kept_1.oracle
    np.testing.assert_array_equal(once["w_in"], plain["w_in"])
    units = np.setdiff1d(np.arange(shape.tree_units), shape.router_units if router == "spent" else ())
    np.testing.assert_array_equal(again["w_in"][:, units], plain["w_in"][:, units])


def test_units_may_be_left_out(rng):
    """Those that are used least, and only where that is asked for."""
    shape, x = TreeShape(n_trees=1, depth=2, node_width=(1, 1, 2)), rng.standard_normal((64, WIDTH))
    energy = rng.random((20, 64)).astype(np.float32) * np.arange(1, 21, dtype=np.float32)[:, None] ** 4
    place = lambda method, drop: placement.place(method, shape, np.float32(x), energy, False, drop=drop)
    assert set(place("frequency", True).ravel()) == set(range(9, 20))
    found = place("cluster", True).ravel()
    assert len(set(found)) == 11 and 19 in found
    with pytest.raises(InputError, match="have room for 11 units, and the dense layer has 20; .* or leave"):
        place("cluster", False)


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


def test_the_value_of_a_leaf_is_the_error_that_it_takes_away(rng):
    """Against every leaf tried in turn."""
    dense, spec = dense_layer(rng, 26), DenseSpec(26)
    x = rng.standard_normal((40, WIDTH)).astype(np.float32)
    recipe = Recipe(SHAPE, "random", refits=1)
    params, _ = convert_layer(dense, spec, x, x, recipe)
    trees, y = convert.tree_spec(spec, recipe), gelu(x @ dense["w_in"].T + dense["b_in"]) @ dense["w_out"]
    got, leaf_TP = run_trees(params, trees, x)
    np.testing.assert_allclose(refit.output_at(params, trees, x, leaf_TP), got, atol=1e-4)
    values, errors = refit.leaf_values(params, trees, x, y, leaf_TP, tree=1), []
    for leaf in range(SHAPE.n_leaves):
        leaf_TP = np.stack([leaf_TP[:, 0], np.full(40, leaf)], axis=1)
        errors.append(np.square(refit.output_at(params, trees, x, leaf_TP) - y).sum(axis=1))
    values, errors = values - values[0], np.stack(errors)
    np.testing.assert_allclose(values, errors[0] - errors, atol=1e-3, rtol=1e-3)
    best = refit.best_leaves(params, trees, x, y)
    assert np.square(refit.output_at(params, trees, x, best) - y).sum() < np.square(got - y).sum()


def test_what_is_kept(rng):
    y = rng.standard_normal((64, 4))
    assert convert.kept(y, y) == 1 and abs(convert.kept(np.tile(y.mean(axis=0), (64, 1)), y)) < 1e-12
    energy = rng.random((9, 5))
    mask = convert.largest(energy, 3)
    for t in range(5):
        assert set(np.flatnonzero(mask[:, t])) == set(sorted(range(9), key=lambda f: -energy[f, t])[:3])


def test_the_energy_of_a_path_is_that_of_its_units(rng):
    shape = TreeShape(n_trees=1, depth=3, node_width=(1, 2, 1, 2))
    energy = rng.random((shape.tree_units, 6)).astype(np.float32)
    unit_U = rng.permutation(shape.tree_units)
    unit_U[-3:] = -1
    of_node = lambda node: sum(energy[unit_U[u]] for u in shape.node_units(node) if unit_U[u] >= 0)
    paths = [sum(of_node(node) for node in path_of(leaf, 3)) for leaf in range(8)]
    np.testing.assert_allclose(fit_routers.path_energies(energy, unit_U, shape), paths, rtol=1e-6)


def test_routers_find_the_best_leaf_where_there_is_one(rng):
    """Leaves that are worth something in one corner of the input each."""
    shape = TreeShape(n_trees=1, depth=2)
    x = rng.standard_normal((512, 2)).astype(np.float32)
    corner = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    w, threshold = fit_routers.fit_tree(x, np.eye(4, dtype=np.float32)[:, corner], shape)
    node = (x @ w[0] > threshold[0]).astype(int)
    leaf = 2 * node + ((x * w[1 + node]).sum(axis=1) > threshold[1 + node])
    assert (leaf == corner).mean() > 0.95


def test_a_router_is_the_minimum_of_its_objective(rng):
    """No nearby decision is better, by the objective written out in float64."""
    x = rng.standard_normal((200, 5)).astype(np.float32)
    gain = x @ rng.standard_normal(5) + 0.5 + rng.standard_normal(200)
    w, threshold = fit_routers.fit_router(x, gain, ridge=2.0)

    def objective(w, threshold):
        loss = np.logaddexp(0, -np.sign(gain) * (x.astype(np.float64) @ w - threshold))
        bias = x.mean(axis=0) @ w - threshold
        return (np.abs(gain) / np.abs(gain).mean()) @ loss + (
            2.0 * x.var(axis=0).mean() * w @ w + 0.02 * bias**2
        ) / 2

    best = objective(w, threshold)
    for step, sign in itertools.product(np.eye(6), (-0.05, 0.05)):
        assert objective(w + sign * step[:5], threshold + sign * step[5]) > best
    right = (x @ w > threshold) == (gain > 0)
    assert right.mean() > 0.8
    nothing, zero = fit_routers.fit_router(x, np.zeros(200))
    assert not nothing.any() and zero == 0


def test_a_split_is_in_halves(rng):
    left, right, goes_right = placement.split(
        rng.standard_normal((50, WIDTH)).astype(np.float32), rng.random((7, 50)).astype(np.float32), rng
    )
    assert len(left) == 4 and sorted([*left, *right]) == list(range(7)) and goes_right.shape == (50,)


def test_the_most_used_units_are_on_top(rng):
    energy = rng.random((26, 40)).astype(np.float32)
    order = np.argsort(-energy.sum(axis=1))
    found = placement.place("frequency", SHAPE, np.zeros((40, WIDTH), np.float32), energy, spent=False)
    assert set(found[:, 0]) == set(order[:2]) and set(found[:, 1:5].ravel()) == set(order[2:10])


@pytest.fixture(scope="module")
def dense_model():
    model = model_spec(DenseSpec(26), DenseSpec(26), DenseSpec(17, "relu"))
    return model, random_variables(model)


def test_a_whole_model(dense_model, rng):
    """Layers of unlike activation part into runs; the new model runs, and other arrays are as before."""
    model, variables = dense_model
    inputs = list(rng.standard_normal((3, 64, 16)).astype(np.float32))
    new, converted, found = convert_model(model, variables, inputs, inputs, Recipe(SHAPE, "cluster"))
    assert [length for _, length in new.runs] == [2, 1] and len(found) == 3
    tokens = jnp.zeros((1, 16), jnp.int32)
    logits, infos = jax.jit(Transformer(new).apply)(converted, tokens)
    assert np.isfinite(logits).all() and infos[0].leaf_TP.shape == (2, 16, 2)
    np.testing.assert_array_equal(
        converted["params"]["run_0"]["attn"]["w_qkv"], variables["params"]["run_0"]["attn"]["w_qkv"]
    )
    assert not converted["params"]["run_1"]["ffn"]["w_in"][0, 1, -2:].any()  # 9 places are left over


def test_layers_out_and_in_again(dense_model):
    model, variables = dense_model
    again, same = stack_layers(model, variables, model.ffns, split_layers(model, variables))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same["params"], variables["params"])


def test_what_cannot_be_converted(dense_model, rng):
    model, variables = dense_model
    inputs = list(rng.standard_normal((3, 64, 16)).astype(np.float32))
    convert = lambda model, recipe: convert_model(model, variables, inputs, inputs, recipe)
    with pytest.raises(InputError, match="have room for 14 units, .* has 26; use a larger"):
        convert(model, Recipe(TreeShape(2, 2), "random"))
    with pytest.raises(InputError, match=r"room for 20 units \(6 of its units are spent on routers\)"):
        convert(model, Recipe(SHAPE, "random", "spent"))
    with pytest.raises(
        InputError, match="method: 'best' is not known; use one of: random, frequency, cluster"
    ):
        convert(model, Recipe(SHAPE, "best"))
    with pytest.raises(InputError, match="router: 'none' is not known; use one of: separate, spent"):
        convert(model, Recipe(SHAPE, "random", "none"))
    with pytest.raises(InputError, match=r"layer 1 is not dense \(ffn.kind 'leaf'\)"):
        convert(model_spec(DenseSpec(9), KINDS["leaf"]), Recipe(SHAPE, "random"))
