"""Pruned leaf layers against a float64 oracle: what is gone is never chosen, what is left is as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.models import FFN, update_routing
from tree_ffn.models.ffn import ffn_params, split_params, total_units
from tree_ffn.tree import IMPLEMENTATIONS, Info
from tree_ffn.tree.leaf import LeafSpec, init_params, leaf_ffn, prune, route

E, T = 6, 40
SPECS = {
    "tree": LeafSpec(n_experts=16, expert_width=2, top_k=3),
    "trees": LeafSpec(n_experts=24, expert_width=1, top_k=4, n_trees=3, gate_norm="l1"),
    "softmax": LeafSpec(n_experts=9, expert_width=3, top_k=2, router="softmax", gate_norm="l1"),
    "random": LeafSpec(n_experts=7, expert_width=2, top_k=1, router="random", gate_norm="none"),
}
NAMES = pytest.mark.parametrize("name", SPECS)


def case(rng, spec):
    """Arrays of a layer with biases that are not 0, tokens and an output's gradient, float64."""
    first = cases.first_weights(init_params, spec, E)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), first)
    for name in {"b_in", "b_out", "b_router", "selection_bias"} & params.keys():
        params[name] = rng.normal(size=params[name].shape) / 3
    return params, 2 * rng.normal(size=(T, E)), rng.normal(size=(T, E))


def kept(rng, spec, n):
    keep_X = np.zeros(spec.n_experts, bool)
    keep_X[rng.permutation(spec.n_experts)[:n]] = True
    return keep_X


# Of each kind of router a layer that has only K experts left, and one that has most.
LEFT = [(name, n_left) for name in SPECS for n_left in ("K", "most")]
QUICK = [("tree", "most"), ("trees", "most"), ("softmax", "K"), ("random", "most")]


@pytest.mark.parametrize(
    "name, n_left", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in LEFT]
)
def test_the_layer_is_its_definition(name, n_left, rng):
    """Of the experts that are left the best; outputs and gradients are the oracle's of the whole arrays."""
    spec = SPECS[name]
    spec = dataclasses.replace(spec, balance_rate=0.1 if spec.router == "tree" else 0.0)
    params, x, dy = case(rng, spec)
    keep_X = kept(rng, spec, spec.top_k if n_left == "K" else spec.n_experts - 3)
    wanted, chosen, grads = leaf_oracle.leaf_layer(params, x, spec, None, dy, keep_X=keep_X)
    pruned_spec, pruned = prune(params, spec, keep_X)
    trained, fixed = split_params(cases.on_device(pruned))
    for implementation in IMPLEMENTATIONS:

        @cases.jit
        def run(trained, x, implementation=implementation):
            layer = lambda trained, x: leaf_ffn(trained | fixed, x, pruned_spec, implementation)
            y, back, info = jax.vjp(layer, trained, x, has_aux=True)
            return y, info.leaf_TP, back(jnp.asarray(dy, jnp.float32))

        y, ids, (d_trained, d_x) = run(trained, jnp.asarray(x, jnp.float32))
        np.testing.assert_array_equal(np.sort(ids, axis=1), chosen)
        cases.assert_near(y, wanted)
        for key, found in (d_trained | {"x": d_x}).items():
            whole = grads[key]
            whole = whole[keep_X] if key in ("w_in", "b_in", "w_out") else whole
            cases.assert_near(found, whole, key)


@NAMES
def test_tokens_whose_experts_stay_keep_their_output(name, rng):
    spec = SPECS[name]
    params, x, _ = case(rng, spec)
    x = jnp.asarray(x, jnp.float32)
    gather = cases.jit(lambda params, x, spec: leaf_ffn(params, x, spec, "gather"), static_argnums=2)
    y, info = gather(cases.on_device(params), x, spec)
    keep_X = np.ones(spec.n_experts, bool)
    keep_X[np.asarray(info.leaf_TP)[T // 2]] = False
    pruned_spec, pruned = prune(params, spec, keep_X)
    z, after = gather(cases.on_device(pruned), x, pruned_spec)
    stays_T = keep_X[np.asarray(info.leaf_TP)].all(axis=1)
    assert 0 < stays_T.sum() < T
    np.testing.assert_allclose(z[stays_T], y[stays_T], rtol=1e-6, atol=1e-6)
    assert keep_X[np.asarray(after.leaf_TP)].all()


@NAMES
def test_what_is_not_a_number_chooses_what_is_there(name, rng):
    spec = SPECS[name]
    params, x, _ = case(rng, spec)
    keep_X = kept(rng, spec, spec.top_k + 1)
    pruned_spec, pruned = prune(params, spec, keep_X)
    x = jnp.asarray(x, jnp.float32).at[0].set(jnp.nan).at[1].set(jnp.inf)
    ids, _ = cases.jit(lambda params, x: route(params, x, pruned_spec))(cases.on_device(pruned), x)
    assert keep_X[np.asarray(ids)].all() and all(len(set(row)) == spec.top_k for row in np.asarray(ids))
    assert np.sort(ids[0]).tolist() == np.flatnonzero(keep_X)[: spec.top_k].tolist()  # of equals the first


def test_what_is_there_is_stored_and_nothing_else(rng):
    spec = SPECS["tree"]
    params, _, _ = case(rng, spec)
    keep_X = kept(rng, spec, 9)
    pruned_spec, pruned = prune(params, spec, keep_X)
    again, twice = prune(pruned, pruned_spec, keep_X & (np.arange(16) != np.flatnonzero(keep_X)[4]))
    wanted = prune(params, spec, keep_X & (np.arange(16) != np.flatnonzero(keep_X)[4]))
    assert again == wanted[0] and again.n_kept == 8 and total_units(again) == 16
    jax.tree.map(np.testing.assert_array_equal, twice, wanted[1])
    first = jax.eval_shape(lambda key: init_params(key, again, E), jax.random.key(0))
    shapes = {name: value.shape for name, value in first.items()}
    assert shapes == {name: value.shape for name, value in twice.items()}
    assert sum(value.size for value in split_params(twice)[0].values()) == ffn_params(again, E)
    variables = jax.eval_shape(FFN(again).init, jax.random.key(0), jnp.zeros((2, E)))
    assert variables["routing"].keys() == {"kept_row"}


def test_layers_that_are_equal_have_equal_specs():
    whole = SPECS["tree"]
    assert dataclasses.replace(whole, n_kept=16) == whole and hash(
        dataclasses.replace(whole, n_kept=16)
    ) == hash(whole)
    assert dataclasses.replace(whole, n_kept=15) != whole


@pytest.mark.parametrize("router, moved", [("softmax", [0.5, 0, -0.5, 0]), ("tree", [-0.5, 0, 0])])
def test_balancing_leaves_alone_what_is_gone(router, moved):
    """Experts 0 and 2 of four are left; all tokens choose 2. Only the root has two sides left."""
    norm = {"top_k": 1, "gate_norm": "none"}
    spec = LeafSpec(n_experts=4, expert_width=1, router=router, balance_rate=0.5, n_kept=2, **norm)
    routing = {"selection_bias": jnp.zeros(spec.router_rows), "kept_row": jnp.array([0, -1, 1, -1])}
    found = update_routing(spec, routing, Info(jnp.full((5, 1), 2)))
    assert found["selection_bias"].tolist() == moved


@pytest.mark.parametrize("fields, said", [
    ({"n_kept": 2}, "top_k: 3 is not allowed; a token can use at most n_kept = 2"),
    ({"n_kept": 17}, "n_kept: 17 is not allowed; there are n_experts = 16"),
    ({"n_kept": -1}, "n_kept: -1 is not allowed"),
    ({"n_kept": 4, "router": "hash", "top_k": 1, "gate_norm": "none"}, "n_kept 4; an id names one expert"),
])  # fmt: skip
def test_specs_that_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(SPECS["tree"], **fields)


def test_what_cannot_be_kept(rng):
    spec = SPECS["tree"]
    params, _, _ = case(rng, spec)
    with pytest.raises(InputError, match="keep: 2 experts are not enough; a token uses 3"):
        prune(params, spec, kept(rng, spec, 2))
    with pytest.raises(InputError, match=r"keep: bool\[4\] is not allowed; use bool\[16\]"):
        prune(params, spec, np.ones(4, bool))
    pruned_spec, pruned = prune(params, spec, np.arange(16) < 8)
    with pytest.raises(InputError, match="an expert that was pruned before"):
        prune(pruned, pruned_spec, np.arange(16) > 4)
