"""Trees whose first or all decisions are hashed from ids: executions against the oracle, and the hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import init_params, routing, tree_ffn, usage
from tree_ffn.tree.pruned import prune


def case(rng, T=13, **fields):
    fields = {"P": 3, "D": 3, "W": "per_level", "S": 1, **fields}
    spec = cases.make_spec(**{"hash_levels": fields["D"], **fields})
    params, x, dy = cases.grid_case(rng, spec, T=T)
    params["salt"] = rng.integers(0, 2**31 - 1, spec.shape.n_trees).astype(np.int32)
    return spec, params, x, dy, rng.integers(0, 50_257, T).astype(np.int32)


def run(spec, params, x, token, execution):
    name = "grouped" if execution == cases.BATCHED else execution
    return tree_ffn(params, x, spec, name, token)


ALL_HASHED = ({}, {"D": 0}, {"P": 1, "W": 2, "act_site": "sum"})
FIRST_HASHED = (
    {"hash_levels": 1},
    {"hash_levels": 2, "routing": "straight_through"},
    {"hash_levels": 1, "routing": "continuous_min"},
    {"hash_levels": 2, "routing": "continuous_product", "router": "silent"},
    {"hash_levels": 1, "router": "frozen"},
    {
        "hash_levels": 1,
        "routing": "continuous_product",
        "openness": "logistic",
        "router": "silent",
        "beam": 2,
    },
)


@cases.compiled
def run_backward(trained, rest, x, token, dy, spec, execution):
    """Output, leaves, and gradients of sum(dy * y) to the trained weights and to x."""
    apply = lambda trained, x: run(spec, {**trained, **rest}, x, token, execution)
    with cases.traced_form(execution):
        y, vjp, info = jax.vjp(apply, trained, x, has_aux=True)
        return (y, info.leaf_TP, *vjp(dy))


@pytest.mark.parametrize("fields", [*ALL_HASHED, *FIRST_HASHED], ids=str)
@pytest.mark.parametrize("execution", [*cases.EXECUTIONS, cases.BATCHED])
def test_agrees_with_the_oracle(execution, fields, rng):
    spec, params, x, dy, token = case(rng, **fields)
    if spec.routing == "straight_through" and execution != "masked":
        pytest.skip("only masked differentiates straight_through")
    want = oracle.forward(params, x, spec, token_T=token)
    grads, dx = oracle.backward(params, x, spec, dy, token_T=token)
    trained = {name: value for name, value in params.items() if name in grads}
    rest = {name: value for name, value in params.items() if name not in grads}
    arrays = cases.on_device((trained, rest, x, token, dy))
    y, got_leaf, got, got_dx = run_backward(*arrays, spec, execution)
    np.testing.assert_array_equal(got_leaf, want.leaf)
    np.testing.assert_allclose(y, want.y, atol=2e-5)
    np.testing.assert_allclose(got_dx, dx, atol=2e-5)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        np.testing.assert_allclose(got[name], grads[name], atol=2e-5)


@pytest.mark.slow
def test_a_tree_is_hashed_down_to_its_level_and_no_further(rng):
    spec, params, x, _, token = case(rng, T=200, D=4, W=1, hash_levels=2)
    _, info = run(spec, cases.on_device(params), jnp.asarray(x), jnp.asarray(token), "grouped")
    hashes = [[oracle.hashed(i, s, 4) for s in params["salt"]] for i in token]
    np.testing.assert_array_equal(info.leaf_TP >> 2, hashes)
    _, other = run(spec, cases.on_device(params), jnp.asarray(-x), jnp.asarray(token), "grouped")
    np.testing.assert_array_equal(other.leaf_TP >> 2, hashes)
    assert np.any(other.leaf_TP != info.leaf_TP)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, marks=pytest.mark.slow), {"hash_levels": 2, "routing": "continuous_min"}],
    ids=str,
)
def test_a_pruned_hash_tree_loses_nothing_on_the_tokens_it_was_pruned_by(fields, rng):
    spec, params, x, _, token = case(rng, T=20, D=4, W=2, **fields)
    y, info = run(spec, cases.on_device(params), jnp.asarray(x), jnp.asarray(token), "gather")
    counts = np.asarray(usage.leaf_counts(info.leaf_TP, 16))
    pruned_spec, pruned = prune(params, spec, counts > 0)
    assert pruned_spec.kept_units < spec.shape.n_trees * spec.shape.tree_units
    same, again = run(pruned_spec, cases.on_device(pruned), jnp.asarray(x), jnp.asarray(token), "gather")
    np.testing.assert_array_equal(np.asarray(same).view(np.uint32), np.asarray(y).view(np.uint32))
    np.testing.assert_array_equal(again.leaf_TP, info.leaf_TP)
    near, _ = run(pruned_spec, cases.on_device(pruned), jnp.asarray(x), jnp.asarray(token), "grouped")
    np.testing.assert_allclose(near, y, atol=2e-5)


def test_every_token_has_a_place_and_trees_differ():
    spec = cases.make_spec(P=2, D=5, hash_levels=5)
    params = init_params(jax.random.key(0), spec, width=4)
    sides = np.asarray(routing.hashed_sides(params, spec, jnp.arange(50_257)))
    leaf = sides @ (2 ** np.arange(4, -1, -1))
    for p in range(2):
        counts = np.bincount(leaf[:, p], minlength=32)
        assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()
    assert 0.02 < np.mean(leaf[:, 0] == leaf[:, 1]) < 0.045  # 1 / 32 by chance


@pytest.mark.parametrize("execution", cases.EXECUTIONS)
def test_ids_are_needed(execution, rng):
    spec, params, x, *_ = case(rng)
    with pytest.raises(InputError, match="token_T: is missing; hash_levels decide by the ids"):
        tree_ffn(cases.on_device(params), jnp.asarray(x), spec, execution)
