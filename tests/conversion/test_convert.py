"""Dense layers into sparse ones, against slow checks: what a visited unit is, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conversion.layers import (
    GROVE,
    LEAVES,
    PATHS,
    SHAPE,
    SPENT,
    WIDTH,
    clustered_layer,
    dense_layer,
    dense_output,
    gelu,
)
from tests.leaf_oracle import leaf_layer
from tests.leaf_oracle import route as oracle_route
from tests.models.kinds import KINDS, model_spec, random_variables
from tree_ffn.conversion import convert, placement
from tree_ffn.conversion.convert import Recipe, convert_layer, convert_model, layer_for, path_layer
from tree_ffn.conversion.refit import refit, squared
from tree_ffn.conversion.targets import output, target_of
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec, Transformer
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeShape, TreeSpec


def check_every_unit_once(params: dict, dense: dict) -> list[int | None]:
    """Which unit of the dense layer stands in each place."""
    rows = {row.tobytes(): f for f, row in enumerate(dense["w_in"])}
    found = [rows.get(row.tobytes()) for row in params["w_in"].reshape(-1, WIDTH)]
    assert sorted(f for f in found if f is not None) == list(range(len(dense["w_in"])))
    return found


@pytest.mark.parametrize("method", placement.METHODS)
@pytest.mark.parametrize("layer", [PATHS, SPENT], ids=["separate", "spent"])
def test_a_visited_unit_of_paths_is_the_dense_unit(method, layer, rng):
    """Token by token, by the layer's definition: only rows of the dense layer add to the output."""
    spent = layer is SPENT
    n_units = 20 if spent else 26
    dense = dense_layer(rng, n_units)
    x, held = rng.standard_normal((2, 96, WIDTH)).astype(np.float32)
    params, _ = convert_layer(dense, DenseSpec(n_units), x, held, Recipe(layer, method, refits=0))
    got = output(params, layer, held)
    unit_at = np.reshape(check_every_unit_once(params, dense), (SHAPE.n_trees, -1))
    for t in range(0, 96, 7):
        visited = []
        for p in range(SHAPE.n_trees):
            node = 0
            for level in range(SHAPE.n_levels):
                visited += [unit_at[p, u] for u in SHAPE.node_units(node)]
                if level < SHAPE.depth:
                    first = SHAPE.node_units(node)[0]
                    if spent:
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


@pytest.mark.parametrize("method", placement.METHODS)
@pytest.mark.parametrize("layer", [LEAVES, GROVE], ids=["one_tree", "two_trees"])
def test_a_visited_unit_of_leaves_is_the_dense_unit(method, layer, rng):
    """A chosen expert adds its dense units, each by the gate over the mean size of gates."""
    n_units = 30
    dense = dense_layer(rng, n_units)
    x, held = rng.standard_normal((2, 96, WIDTH)).astype(np.float32)
    params, _ = convert_layer(dense, DenseSpec(n_units), x, held, Recipe(layer, method, refits=0))
    got = output(params, layer, held)
    unit_at = np.reshape(check_every_unit_once(params, dense), (layer.n_experts, -1))
    _, calibrated, _ = oracle_route(params, x, layer)
    ids, gates, _ = oracle_route(params, held, layer)
    size = np.sqrt(np.square(calibrated).mean())
    for t in range(0, 96, 7):
        want = np.float64(params["b_out"])
        for j, gate in zip(ids[t], gates[t]):
            units = [f for f in unit_at[j] if f is not None]
            z = dense["w_in"][units] @ held[t] + dense["b_in"][units]
            want = want + gate / size * (gelu(z) @ dense["w_out"][units])
        np.testing.assert_allclose(got[t], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gate_norm, top_k", [("none", 8), ("l1", 8), ("l2", 8), ("rms", 8), ("none", 1)])
def test_with_all_experts_chosen_it_is_the_dense_layer(gate_norm, top_k, rng):
    """In float64, by the leaf layer's oracle: gates are equal, and w_out makes up for their size."""
    layer = LeafSpec(n_experts=top_k, expert_width=32 // top_k, top_k=top_k, gate_norm=gate_norm)
    dense = dense_layer(rng, 30)
    x, held = rng.standard_normal((2, 96, WIDTH)).astype(np.float32)
    for refits in (0, 2):
        params, shares = convert_layer(dense, DenseSpec(30), x, held, Recipe(layer, "cluster", refits=refits))
        y, ids, _ = leaf_layer(params, np.float64(held), layer)
        assert ids.shape == (96, top_k)
        np.testing.assert_allclose(y, dense_output(dense, held), atol=1e-4 if refits else 2e-6)
        assert min(shares) > 1 - 1e-6


@pytest.mark.parametrize("shape", [
    TreeShape(n_trees=1, depth=0, node_width=12),
    TreeShape(n_trees=3, depth=0, node_width=4),
])  # fmt: skip
def test_paths_through_everything_are_the_dense_layer(shape, rng):
    dense, spec = dense_layer(rng, 12), DenseSpec(12, "relu")
    x = rng.standard_normal((64, WIDTH)).astype(np.float32)
    for method in placement.METHODS:
        recipe = Recipe(path_layer(shape), method)
        params, shares = convert_layer(dense, spec, x, x, recipe)
        want = dense_output(dense, x, lambda z: np.maximum(z, 0))
        np.testing.assert_allclose(output(params, layer_for(spec, recipe), x), want, atol=1e-4)
        assert min(shares) > 1 - 1e-6


def test_known_clusters_are_found(rng):
    """Four groups, four leaves: the tree sends every token to its group's units, and random ones do not."""
    dense, x, held = clustered_layer(rng)
    shape = TreeShape(n_trees=1, depth=2, node_width=(1, 1, 4))
    leaves = LeafSpec(n_experts=4, expert_width=4, top_k=1, gate_norm="none")

    def share(method, layer):
        return convert_layer(dense, DenseSpec(16, "relu"), x, held, Recipe(layer, method, refits=0))[1].layer

    for layer in (path_layer(shape, "spent"), leaves):
        assert share("cluster", layer) > 0.97
        assert share("random", layer) < 0.77
    # Where routers stand apart, nodes above take a unit each, and an odd rest parts into unequal halves.
    assert share("cluster", path_layer(shape)) > share("random", path_layer(shape)) + 0.2


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("layer", [
    path_layer(TreeShape(n_trees=2, depth=3, node_width=1)),
    LeafSpec(n_experts=16, expert_width=2, top_k=4, gate_norm="rms"),
], ids=["paths", "leaves"])  # fmt: skip
def test_no_method_beats_the_oracle(activation, layer, rng):
    n_units = layer.total_units
    dense, spec = dense_layer(rng, n_units), DenseSpec(n_units, activation)
    x, held = rng.standard_normal((2, 512, WIDTH)).astype(np.float32)
    recipe = lambda method: Recipe(layer, method, refits=0)
    found = {m: convert_layer(dense, spec, x, held, recipe(m))[1] for m in placement.METHODS}
    for shares in found.values():
        assert shares.oracle > shares.static and shares.experts > shares.layer
        if (
            layer.active_units < 10
        ):  # of experts those that cancel errors are chosen too, of units those that add most
            assert shares.oracle > shares.experts
        assert (shares.oracle, shares.static) == (found["random"].oracle, found["random"].static)


MORE = {
    "separate": path_layer(TreeShape(n_trees=2, depth=3, node_width=(1, 1, 1, 2))),
    "spent": path_layer(TreeShape(n_trees=2, depth=3, node_width=(1, 1, 1, 2)), "spent"),
    "leaves": LeafSpec(n_experts=16, expert_width=2, top_k=3, gate_norm="rms"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_solving_for_output_weights_keeps_more(name, rng):
    """On held-out tokens, and more with routers fitted to the error; what units read stays as it was."""
    layer = MORE[name]
    dense, spec = dense_layer(rng, 32), DenseSpec(32)
    x, held = rng.standard_normal((2048, WIDTH)), rng.standard_normal((512, WIDTH))
    convert = lambda refits: convert_layer(
        dense, spec, np.float32(x), np.float32(held), Recipe(layer, "cluster", refits=refits)
    )
    (plain, kept_0), (once, kept_1), (again, kept_2) = map(convert, range(3))
    assert kept_0.layer + 0.1 < kept_1.layer < kept_2.layer < kept_2.experts
    assert kept_0.static < kept_1.static and kept_0.oracle < kept_1.oracle
    np.testing.assert_array_equal(once["w_in"], plain["w_in"])
    units = slice(None)
    if isinstance(layer, TreeSpec):
        units = np.setdiff1d(np.arange(layer.shape.tree_units), layer.shape.router_units)
    np.testing.assert_array_equal(again["w_in"][:, units], plain["w_in"][:, units])


@pytest.mark.parametrize("name", MORE)
def test_more_refits_never_keep_less_on_the_calibration_tokens(name, rng):
    """Even of few tokens, where routers that are fitted anew may fit worse."""
    layer, dense = MORE[name], dense_layer(rng, 32)
    for tokens in (40, 200):
        x = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
        y = dense_output(dense, x).astype(np.float32)
        first, _ = convert_layer(dense, DenseSpec(32), x, x, Recipe(layer, "cluster", refits=0))
        fitted = [refit(target_of(layer), first, x, y, times) for times in range(6)]
        errors = [squared(y - output(params, layer, x)) for params in fitted]
        assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]


@pytest.fixture(scope="module")
def dense_model():
    model = model_spec(DenseSpec(26), DenseSpec(26), DenseSpec(17, "relu"))
    return model, random_variables(model)


@pytest.mark.parametrize("layer, visited", [(PATHS, 2), (LEAVES, 3)], ids=["paths", "leaves"])
def test_a_whole_model(layer, visited, dense_model, rng):
    """Layers of unlike activation part into runs; the new model runs, and other arrays are as before."""
    model, variables = dense_model
    inputs = list(rng.standard_normal((3, 64, 16)).astype(np.float32))
    new, converted, found = convert_model(model, variables, inputs, inputs, Recipe(layer, "cluster"))
    assert [length for _, length in new.runs] == [2, 1] and len(found) == 3
    tokens = jnp.zeros((1, 16), jnp.int32)
    logits, infos = jax.jit(Transformer(new).apply)(converted, tokens)
    assert np.isfinite(logits).all() and infos[0].leaf_TP.shape == (2, 16, visited)
    np.testing.assert_array_equal(
        converted["params"]["run_0"]["attn"]["w_qkv"], variables["params"]["run_0"]["attn"]["w_qkv"]
    )
    w_in = converted["params"]["run_1"]["ffn"]["w_in"][0].reshape(-1, 16)
    assert (~w_in.any(axis=1)).sum() == layer.total_units - 17  # places that are left over


def test_a_dense_start_is_over(rng):
    """What a model was trained from is not what it is converted into."""
    layer = LeafSpec(n_experts=8, expert_width=4, top_k=3, dense_start=0.2)
    assert layer_for(DenseSpec(30, "relu"), Recipe(layer, "random")) == LeafSpec(
        n_experts=8, expert_width=4, top_k=3, activation="relu"
    )


def test_layers_out_and_in_again(dense_model):
    model, variables = dense_model
    again, same = stack_layers(model, variables, model.ffns, split_layers(model, variables))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same["params"], variables["params"])


@pytest.mark.parametrize("layer, method, said", [
    (path_layer(TreeShape(2, 2)), "random", "have room for 14 units, .* has 26; use a larger"),
    (SPENT, "random", r"\(6 units of them are spent on routers\) have room for 20 units"),
    (LeafSpec(n_experts=8, expert_width=3, top_k=2), "random",
     "8 experts of expert_width 3 have room for 24 units, .* has 26; use a larger"),
    (PATHS, "best", "method: 'best' is not known; use one of: random, frequency, cluster"),
    (LeafSpec(n_experts=8, expert_width=4, top_k=2, router="softmax"), "random",
     "router: 'softmax' with n_kept 0"),
    (LeafSpec(n_experts=8, expert_width=4, top_k=2, n_kept=7), "random", "router: 'tree' with n_kept 7"),
    (PrunedSpec(SHAPE, router="frozen", nodes=(2, 3, 4)), "random", "act_site: 'node' of a PrunedSpec"),
    (TreeSpec(SHAPE, act_site="sum"), "random", "act_site: 'sum' of a TreeSpec is not allowed"),
])  # fmt: skip
def test_what_nothing_is_converted_into(layer, method, said, dense_model, rng):
    model, variables = dense_model
    inputs = list(rng.standard_normal((3, 64, 16)).astype(np.float32))
    with pytest.raises(InputError, match=said):
        convert_model(model, variables, inputs, inputs, Recipe(layer, method))


def test_what_cannot_be_converted():
    with pytest.raises(InputError, match="router: 'none' is not known; use one of: separate, spent"):
        path_layer(SHAPE, "none")
    with pytest.raises(InputError, match=r"layer 1 is not dense \(ffn.kind 'leaf'\)"):
        convert.check_convertible(model_spec(DenseSpec(9), KINDS["leaf"]), Recipe(PATHS, "random"))


def test_what_is_kept(rng):
    y = rng.standard_normal((64, 4))
    assert convert.kept(y, y) == 1 and abs(convert.kept(np.tile(y.mean(axis=0), (64, 1)), y)) < 1e-12
    energy = rng.random((9, 5))
    mask = convert.largest(energy, 3)
    for t in range(5):
        assert set(np.flatnonzero(mask[:, t])) == set(sorted(range(9), key=lambda f: -energy[f, t])[:3])
