"""Trees whose paths are hashed from ids: every execution against the oracle, and the hash itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import init_params, routing, tree_ffn, usage
from tree_ffn.tree.pruned import prune


def case(rng, T=13, **shape):
    spec = cases.make_spec(**{"P": 3, "D": 3, "W": "per_level", "S": 1, **shape}, router="hash")
    params, x, dy = cases.grid_case(rng, spec, T=T)
    params["salt"] = rng.integers(0, 2**31 - 1, spec.shape.n_trees).astype(np.int32)
    token = rng.integers(0, 50_257, T).astype(np.int32)
    leaf = [[oracle.hashed(i, s, 2**spec.shape.depth) for s in params["salt"]] for i in token]
    return spec, params, x, dy, token, np.array(leaf, np.int32).reshape(T, -1)


def run(spec, params, x, token, execution):
    name = "grouped" if execution == cases.BATCHED else execution
    return tree_ffn(params, x, spec, name, token)


@pytest.mark.parametrize("shape", [{}, {"D": 0}, {"P": 1, "W": 2, "act_site": "sum"}], ids=str)
@pytest.mark.parametrize("execution", [*cases.EXECUTIONS, cases.BATCHED])
def test_agrees_with_the_oracle(execution, shape, rng):
    spec, params, x, dy, token, leaf = case(rng, **shape)
    want = oracle.forward(params, x, spec, leaf)
    grads, dx = oracle.backward(params, x, spec, dy, leaf)
    trained = {name: value for name, value in params.items() if name in grads}
    rest = cases.on_device({name: value for name, value in params.items() if name not in grads})
    apply = lambda trained, x: run(spec, {**trained, **rest}, x, jnp.asarray(token), execution)
    with cases.traced_form(execution):
        y, vjp, info = jax.vjp(apply, *cases.on_device((trained, x)), has_aux=True)
        got, got_dx = vjp(jnp.asarray(dy))
    np.testing.assert_array_equal(info.leaf_TP, leaf)
    np.testing.assert_allclose(y, want.y, atol=2e-5)
    np.testing.assert_allclose(got_dx, dx, atol=2e-5)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        np.testing.assert_allclose(got[name], grads[name], atol=2e-5)


def test_a_pruned_hash_tree_loses_nothing_on_the_tokens_it_was_pruned_by(rng):
    spec, params, x, _, token, _ = case(rng, T=20, D=4, W=2)
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
    spec = cases.make_spec(P=2, D=5, router="hash")
    salt_P = init_params(jax.random.key(0), spec, width=4)["salt"]
    sides = np.asarray(routing.hashed_sides(jnp.arange(50_257), salt_P, 5))
    leaf = sides @ (2 ** np.arange(4, -1, -1))
    for p in range(2):
        counts = np.bincount(leaf[:, p], minlength=32)
        assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()
    assert 0.02 < np.mean(leaf[:, 0] == leaf[:, 1]) < 0.045  # 1 / 32 by chance


@pytest.mark.parametrize("execution", cases.EXECUTIONS)
def test_ids_are_needed(execution, rng):
    spec, params, x, *_ = case(rng)
    with pytest.raises(InputError, match="token_T: is missing; router 'hash' decides by the ids"):
        tree_ffn(cases.on_device(params), jnp.asarray(x), spec, execution)
