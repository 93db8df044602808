"""Which weights a routing lets learn: the rows that get a gradient, and what it depends on."""

import functools

import jax
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases


@functools.partial(
    jax.jit, static_argnames=("spec", "execution"), compiler_options={"xla_backend_optimization_level": 0}
)
def gradients(params, x, dy, spec, execution):
    """Of sum(dy * y), to all weights."""
    return jax.vjp(lambda params: cases.layer(params, x, spec, execution)[0], params)[1](dy)[0]


def visited(params, x, spec):
    """[P, U]: whether any token visits the unit."""
    units = np.zeros((spec.shape.n_trees, spec.shape.tree_units), bool)
    for paths in oracle.forward(params, x, spec).paths:
        for tree, steps in enumerate(paths):
            for step in steps:
                units[tree, step.rows] = True
    return units


def rows(grads):
    """[P, U] for each of the tree's weights: whether the row has any gradient."""
    return {
        "w_in": np.any(np.asarray(grads["w_in"]) != 0, axis=-1),
        "b_in": np.asarray(grads["b_in"]) != 0,
        "w_out": np.any(np.asarray(grads["w_out"]) != 0, axis=-1),
    }


def case_of(rng, routing, activation, T=2):
    spec = cases.make_spec(routing, P=2, D=2, W=2, activation=activation)
    params, x, dy = cases.grid_case(rng, spec, T=T)
    units = visited(params, x, spec)
    assert 0.2 < units.mean() < 0.9  # or there would be little to see
    return spec, *cases.on_device((params, x, dy)), units


@pytest.mark.parametrize(
    "activation, execution",
    [("gelu", "masked"), ("gelu", "gather"), ("gelu", "grouped"), ("tanh", "masked"), ("identity", "masked")],
)
def test_hard_exactly_the_visited_units_learn(activation, execution, rng):
    spec, params, x, dy, units = case_of(rng, "hard", activation)
    for name, learns in rows(gradients(params, x, dy, spec, execution)).items():
        np.testing.assert_array_equal(learns, units, err_msg=name)


@pytest.mark.parametrize("execution", ["masked", "grouped"])
def test_hard_relu_no_others_learn(execution, rng):
    spec, params, x, dy, units = case_of(rng, "hard", "relu")
    for name, learns in rows(gradients(params, x, dy, spec, execution)).items():
        assert np.any(learns) and not np.any(learns & ~units), name


@pytest.mark.parametrize("gate, execution", [("min", "masked"), ("min", "grouped"), ("product", "masked")])
def test_continuous_none_outside_the_path_learns(gate, execution, rng):
    spec, params, x, dy, units = case_of(rng, f"continuous_{gate}", "gelu")
    for name, learns in rows(gradients(params, x, dy, spec, execution)).items():
        np.testing.assert_array_equal(learns, units, err_msg=name)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "identity"])
def test_straight_through_the_same_rows_as_hard(activation, rng):
    spec, params, x, dy, units = case_of(rng, "straight_through", activation)
    for name, learns in rows(gradients(params, x, dy, spec, "masked")).items():
        np.testing.assert_array_equal(learns, units, err_msg=name)


def test_straight_through_routers_see_the_untaken_child(rng):
    """Every visited router's gradient changes with its untaken child's w_out; under hard none does."""
    for routing in ("hard", "straight_through"):
        spec = cases.make_spec(routing, P=1, D=3, W=2)
        params, x, dy = cases.grid_case(np.random.default_rng(7), spec, T=1)
        steps = oracle.forward(params, x, spec).paths[0][0]
        before = gradients(*cases.on_device((params, x, dy)), spec, "masked")["w_in"][0]
        for level in range(3):
            sibling = steps[level + 1].node + (1 if steps[level + 1].node % 2 else -1)
            changed = params | {"w_out": params["w_out"].copy()}
            changed["w_out"][0, oracle.rows_of(spec, sibling)] += 1.0
            after = gradients(*cases.on_device((changed, x, dy)), spec, "masked")["w_in"][0]
            differs = np.any(np.asarray(after != before), axis=-1)
            expected = [steps[level].rows.start] if routing == "straight_through" else []
            assert np.flatnonzero(differs).tolist() == expected


def test_frozen_routers_do_not_learn_and_their_units_do(rng):
    """random_tree: all visited units get a gradient, the vectors that decide get none."""
    spec = cases.make_spec("hard", P=2, D=2, W=2, router="frozen")
    params, x, dy = cases.grid_case(rng, spec, T=2)
    units = visited(params, x, spec)
    for execution in ("masked", "grouped"):
        grads = gradients(*cases.on_device((params, x, dy)), spec, execution)
        assert not np.any(grads["router"]["w"])
        for name, learns in rows(grads).items():
            np.testing.assert_array_equal(learns, units, err_msg=name)
