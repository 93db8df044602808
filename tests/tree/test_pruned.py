"""Pruned layers against the float64 oracle of the full trees, which is told the leaves that are left."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import IMPLEMENTATIONS, PrunedSpec, prune, tree_ffn, usage
from tree_ffn.tree.path import balance_update, init_params
from tree_ffn.tree.path.pruned import STRUCTURE, init_structure, present_leaves


@functools.partial(cases.jit, static_argnames=("spec", "implementation"))
def run(params, structure, x, dy, spec, implementation):
    layer = lambda params, x: tree_ffn({**params, **structure}, x, spec, implementation)
    y, vjp, info = jax.vjp(layer, params, x, has_aux=True)
    return (y, info.leaf_TP, *vjp(dy))


def make(keep, rng, T=21, **fields):
    """Spec, weights, tokens and output gradients of a full layer, and the leaves to keep."""
    spec = cases.make_spec(**{"activation": "silu", **fields})
    P, J = spec.shape.n_trees, spec.shape.n_leaves
    kept_PJ = np.ones((P, J), bool)
    if keep != "all":
        kept_PJ = rng.random((P, J)) < (0.4 if keep == "some" else 0)
        kept_PJ[np.arange(P), rng.integers(0, J, P)] = True
    return spec, *cases.grid_case(rng, spec, T=T), kept_PJ


def kept_nodes(spec, kept_PJ):
    """(tree, heap node) of every kept node, in the order of a pruned layer's arrays."""
    depth = spec.shape.depth
    alive = {
        (level, p, (leaf >> (depth - level)) + 2**level - 1)
        for p, leaf in np.argwhere(kept_PJ)
        for level in range(depth + 1)
    }
    return [(int(p), int(node)) for _, p, node in sorted(alive)]


def kept_rows(array, spec, kept_PJ):
    """Rows of the kept units of an array [P, U, ...]."""
    runs = [np.asarray(array)[p, oracle.rows_of(spec, node)] for p, node in kept_nodes(spec, kept_PJ)]
    return np.concatenate(runs)


def split(pruned):
    """Weights, and the structure, which is no weight."""
    structure = {name: pruned[name] for name in STRUCTURE}
    return {name: value for name, value in pruned.items() if name not in STRUCTURE}, structure


def check(spec, params, x, dy, kept_PJ, implementation):
    """Leaves, outputs and gradients of the pruned layer are those of the full one along the kept paths."""
    want = oracle.forward(params, x, spec, kept_PJ=kept_PJ)
    pruned_spec, pruned = prune(params, spec, kept_PJ)
    for name in ("w_in", "b_in", "w_out"):
        np.testing.assert_array_equal(pruned[name], kept_rows(params[name], spec, kept_PJ))
    y, leaf, grads, dx = run(*cases.on_device((*split(pruned), x, dy)), pruned_spec, implementation)
    np.testing.assert_array_equal(leaf, want.leaf)
    assert leaf.dtype == jnp.int32 and y.dtype == x.dtype
    cases.assert_near(y, want.y, "y")
    want_grads, want_dx = oracle.backward(params, x, spec, dy, kept_PJ=kept_PJ)
    wanted = {name: kept_rows(want_grads[name], spec, kept_PJ) for name in ("w_in", "b_in", "w_out")}
    cases.assert_near(dx, want_dx, "dx")
    cases.assert_same_gradients(grads, {**wanted, "b_out": want_grads["b_out"]})


@pytest.mark.parametrize("keep", ["some", "one path", "all"])
@pytest.mark.parametrize(
    "implementation, fields",
    [
        ("masked", {"P": 3, "D": 3, "W": "per_level"}),
        ("masked", {"P": 2, "D": 2, "router": "frozen", "act_site": "sum"}),
        ("gather", {"P": 3, "D": 3, "W": "per_level", "router": "frozen"}),
        ("gather", {"P": 1, "D": 0, "W": 2}),
        ("grouped", {"P": 2, "D": 3, "W": 2, "act_site": "sum"}),
        (None, {"P": 3, "D": 1}),
    ],
    ids=str,
)
def test_agrees_with_the_oracle(implementation, fields, keep, rng):
    check(*make(keep, rng, **fields), implementation)


@pytest.mark.parametrize("router", ["first_unit", "frozen"])
@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens_read_the_routers_that_they_meet(router, T, rng):
    check(*make("some", rng, T=T, P=2, D=4, W=2, router=router), None)


@pytest.mark.parametrize("router", ["first_unit", "frozen"])
def test_no_bit_is_lost_where_no_visited_leaf_is_removed(router, rng):
    """Threshold 0 on the very tokens it was decided by, in gather; others agree to rounding."""
    spec, params, x, _, _ = make("all", rng, T=40, P=2, D=5, W=2, router=router)
    params, x = cases.on_device((params, x))
    y, info = jax.jit(lambda p, x: tree_ffn(p, x, spec, "gather"))(params, x)
    counts = np.asarray(usage.leaf_counts(info.leaf_TP, 32))
    assert (counts == 0).any()
    pruned_spec, pruned = prune(params, spec, counts > 0)
    for implementation in IMPLEMENTATIONS:
        layer = jax.jit(lambda p, x, i=implementation: tree_ffn(p, x, pruned_spec, i))
        same, again = layer(cases.on_device(pruned), x)
        np.testing.assert_array_equal(again.leaf_TP, info.leaf_TP)
        if implementation == "gather":
            np.testing.assert_array_equal(np.asarray(same).view(np.uint32), np.asarray(y).view(np.uint32))
        cases.assert_near(same, y, implementation)


def test_a_pruned_layer_can_be_pruned_again(rng):
    spec, params, _, _, kept_PJ = make("some", rng, P=3, D=3, W="per_level", router="frozen")
    less_PJ = kept_PJ & (np.cumsum(kept_PJ, axis=1) == 1)
    once_spec, once = prune(params, spec, kept_PJ)
    np.testing.assert_array_equal(present_leaves(once, once_spec), kept_PJ)
    direct_spec, direct = prune(params, spec, less_PJ)
    twice_spec, twice = prune(once, once_spec, less_PJ)
    assert direct_spec == twice_spec and direct_spec.is_one_path
    jax.tree.map(np.testing.assert_array_equal, direct, twice)
    with pytest.raises(InputError, match="pruned before"):
        prune(twice, twice_spec, kept_PJ)


@pytest.mark.parametrize("nodes", [(2, 2, 2, 2), (2, 4, 8, 16), (2, 3, 5, 7), (2, 2, 3, 4)])
def test_initial_weights_have_some_structure_of_these_sizes(nodes):
    full = cases.make_spec(P=2, D=3)
    spec = PrunedSpec(full.shape, nodes=nodes)
    structure = init_structure(spec)
    kept_PJ = np.zeros((2, 8), bool)
    kept_PJ[structure["path"][:, 0], structure["leaf"]] = True
    found_spec, found = prune(cases.first_weights(init_params, full, 4), full, kept_PJ)
    assert found_spec.nodes == nodes
    for name in STRUCTURE:
        np.testing.assert_array_equal(found[name], structure[name])
    y, _ = jax.eval_shape(
        lambda x: tree_ffn(init_params(jax.random.key(0), spec, 4), x, spec), jnp.ones((3, 4))
    )
    assert y.shape == (3, 4)


def test_balancing_moves_forks_alone(rng):
    spec, params, x, _, kept_PJ = make("some", rng, P=2, D=3, balance_rate=0.5)
    pruned_spec, pruned = prune(params, spec, kept_PJ)
    leaf_TP = oracle.forward(params, x, spec, kept_PJ=kept_PJ).leaf
    counts = usage.leaf_counts(jnp.asarray(leaf_TP), 8)
    new = cases.jit(balance_update, static_argnums=2)(cases.on_device(pruned), counts, pruned_spec)
    moved = (np.asarray(new) - pruned["threshold"]) / 0.5
    alive = kept_nodes(spec, kept_PJ)
    for (p, node), step in zip([(p, n) for p, n in alive if n < 7], moved, strict=True):
        visits = [0, 0]
        for leaf in leaf_TP[:, p] + 7:
            while leaf > node:
                above = (leaf - 1) // 2
                if above == node:
                    visits[leaf - (2 * node + 1)] += 1
                leaf = above
        both = all((p, child) in alive for child in (2 * node + 1, 2 * node + 2))
        assert step == (np.sign(visits[1] - visits[0]) if both else 0)


@pytest.mark.slow
def test_memory_falls():
    """A quarter of the leaves: less memory for the weights, and less at the peak, forward and backward."""
    spec = cases.make_spec("hard", P=1, D=6, W=8)
    params = init_params(jax.random.key(0), spec, width=64)
    pruned_spec, pruned = prune(params, spec, np.arange(64)[None] < 16)
    bytes_of = lambda arrays: sum(array.nbytes for array in jax.tree.leaves(arrays))
    assert bytes_of(pruned) < 0.3 * bytes_of(params)

    def peak(spec, params, structure, implementation, n_tokens):
        def step(params, structure, x):
            loss = lambda params: jnp.sum(tree_ffn({**params, **structure}, x, spec, implementation)[0] ** 2)
            return jax.grad(loss)(params)

        x = jax.ShapeDtypeStruct((n_tokens, 64), jnp.float32)
        stats = jax.jit(step).lower(params, structure, x).compile().memory_analysis()
        return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes

    for implementation, n_tokens in (("gather", 1), ("masked", 64), ("grouped", 256)):
        whole = peak(spec, params, {}, implementation, n_tokens)
        part = peak(pruned_spec, *cases.on_device(split(pruned)), implementation, n_tokens)
        assert part < 0.6 * whole, (implementation, part, whole)


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda s, p, k: prune(p, s, k[:, :4]), r"keep: bool\[2, 4\] is not allowed; use bool\[2, 8\]"),
        (lambda s, p, k: prune(p, s, k & False), "keep: tree 0 would lose all its leaves"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(2, 4, 8)), "nodes: .* use 4 numbers"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(2, 5, 5, 5)), "nodes: .* is not allowed"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(1, 1, 1, 1)), "nodes: .* n_trees = 2"),
        (lambda s, p, k: tree_ffn(p, jnp.ones((1, 6)), prune(p, s, k)[0]), r"w_in: shape .* does not fit"),
    ],
)
def test_mistakes_get_one_sentence(mistake, words, rng):
    spec, params, _, _, kept_PJ = make("some", rng, P=2, D=3)
    with pytest.raises(InputError, match=words) as caught:
        mistake(spec, params, kept_PJ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_straight_through_is_not_differentiated(implementation, rng):
    spec, params, x, dy, kept_PJ = make("some", rng, P=1, D=2)
    pruned_spec, pruned = prune(params, dataclasses.replace(spec, routing="straight_through"), kept_PJ)
    arrays = cases.on_device((*split(pruned), x, dy))
    forward = cases.jit(lambda params, x: tree_ffn(params, x, pruned_spec, implementation)[0])
    y = forward({**arrays[0], **arrays[1]}, arrays[2])
    cases.assert_near(y, oracle.forward(params, x, spec, kept_PJ=kept_PJ).y)
    with pytest.raises(InputError, match="in a layer that is not pruned"):
        run(*arrays, pruned_spec, implementation)
