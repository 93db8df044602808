"""Pruned layers against the float64 oracle of the full trees, which is told the leaves that are left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tests.tree.test_executions import assert_near, name_of
from tree_ffn.errors import InputError
from tree_ffn.tree import PrunedSpec, init_params, pick_implementation, prune, tree_ffn, usage
from tree_ffn.tree.pruned import STRUCTURE, balance_update, init_structure, present_leaves

EXECUTIONS = ("gather", "grouped", cases.BATCHED)
FACTORS = {
    "routing": ("hard", "straight_through", "continuous_min", "continuous_product", "frozen"),
    "act_site": ("node", "sum"),
    "P": (1, 3),
    "D": (0, 1, 3),
    "W": (1, "per_level"),
    "S": (0, 2),
    "keep": ("some", "one path", "all"),
}

PRODUCT = cases.all_combinations(FACTORS | {"D": (3,), "W": ("per_level",)})


@cases.compiled
def run_backward(params, x, dy, spec, execution):
    structure = {name: params[name] for name in STRUCTURE}
    params = {name: value for name, value in params.items() if name not in STRUCTURE}
    with cases.traced_form(execution):
        run = lambda params, x: cases.layer({**params, **structure}, x, spec, execution)
        y, vjp, info = jax.vjp(run, params, x, has_aux=True)
        return (y, info.leaf_TP, *vjp(dy))


def make(routing, keep, rng, **sizes):
    """Spec, weights, tokens and output gradients of a full layer, and the leaves to keep."""
    options = {"routing": "hard", "router": "frozen"} if routing == "frozen" else {"routing": routing}
    spec = cases.make_spec(activation="silu", **options, **sizes)
    P, J = spec.shape.n_trees, spec.shape.n_leaves
    keep_PJ = np.ones((P, J), bool)
    if keep != "all":
        keep_PJ = rng.random((P, J)) < (0.4 if keep == "some" else 0)
        keep_PJ[np.arange(P), rng.integers(0, J, P)] = True
    return spec, *cases.grid_case(rng, spec, T=21), keep_PJ


def leaves_by_hand(params, x, spec, keep_PJ):
    """The rule itself: a token whose child is gone goes to the sibling; a beam keeps of what is there."""
    depth, leaf_TP = spec.shape.depth, np.zeros((len(x), spec.shape.n_trees), np.int32)
    params, x = oracle.to_float64(params), oracle.to_float64(x)
    for t, p in np.ndindex(leaf_TP.shape):
        if spec.beam > 1:
            there = {node for tree, node in kept_nodes(spec, keep_PJ) if tree == p}
            leaf_TP[t, p] = oracle.search(params, x[t], spec, p, is_there=there.__contains__)
            continue
        node = 0
        for level in range(depth):
            child = 2 * node + 1 + int(oracle._visit(params, x[t], spec, p, node)[2] > 0)
            place, below = child - (2 ** (level + 1) - 1), 2 ** (depth - level - 1)
            gone = not keep_PJ[p, place * below : (place + 1) * below].any()
            node = (child - 1 if child % 2 == 0 else child + 1) if gone else child
        leaf_TP[t, p] = node - (2**depth - 1)
    return leaf_TP


def kept_nodes(spec, keep_PJ):
    """(tree, heap node) of every kept node, in the order of a pruned layer's arrays."""
    depth = spec.shape.depth
    alive = {
        (level, p, (leaf >> (depth - level)) + 2**level - 1)
        for p, leaf in np.argwhere(keep_PJ)
        for level in range(depth + 1)
    }
    return [(int(p), int(node)) for _, p, node in sorted(alive)]


def kept_rows(name, array, spec, keep_PJ):
    """Rows of the kept units of w_in or b_in [P, U, ...], or of w_out."""
    rows_of = oracle.out_rows_of if name == "w_out" else oracle.rows_of
    return np.concatenate([np.asarray(array)[p, rows_of(spec, n)] for p, n in kept_nodes(spec, keep_PJ)])


def check(spec, params, x, dy, keep_PJ, executions=EXECUTIONS):
    """Leaves, outputs and gradients of the pruned layer are those of the full one along the kept paths."""
    leaf_TP = leaves_by_hand(params, x, spec, keep_PJ)
    want = oracle.forward(params, x, spec, leaf_TP)
    pruned_spec, pruned = prune(params, spec, keep_PJ)
    for name in ("w_in", "b_in", "w_out"):
        np.testing.assert_array_equal(pruned[name], kept_rows(name, params[name], spec, keep_PJ))
    pruned, x, dy = cases.on_device((pruned, x, dy))
    hard = spec.routing == "straight_through"
    for execution in executions:
        if hard:
            y, leaf = cases.run_forward(pruned, x, pruned_spec, execution)
        else:
            y, leaf, grads, dx = run_backward(pruned, x, dy, pruned_spec, execution)
        np.testing.assert_array_equal(leaf, leaf_TP, err_msg=execution)
        assert leaf.dtype == jnp.int32 and y.dtype == x.dtype
        assert_near(y, want.y, f"{execution} y")
        if hard:
            continue
        want_grads, want_dx = oracle.backward(params, x, spec, dy, leaf_TP)
        assert_near(dx, want_dx, f"{execution} dx")
        assert_near(grads["b_out"], want_grads["b_out"], "b_out")
        for name in ("w_in", "b_in", "w_out"):
            wanted = kept_rows(name, want_grads[name], spec, keep_PJ)
            assert_near(grads[name], wanted, f"{execution} {name}")
            assert not np.any(np.asarray(grads[name])[wanted == 0]), f"{name} beside the path"
        for name in ("threshold", "router"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads.get(name, ())))
        for name, value in grads.get("shared", {}).items():
            assert_near(value, want_grads["shared"][name], f"{execution} shared {name}")


@pytest.mark.parametrize("case", cases.all_pairs(FACTORS), ids=name_of)
def test_agrees_with_the_oracle(case, rng):
    check(*make(**case, rng=rng))


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=name_of)
def test_agrees_with_the_oracle_everywhere(case, rng):
    check(*make(**case, rng=rng))


@pytest.mark.slow
@pytest.mark.parametrize(
    "gates, W",
    [
        ({}, "per_level"),
        ({"openness": "logistic", "renormalise": True, "gate_norm": 2}, 1),
        ({"openness": "logistic", "renormalise": True, "gate_norm": 2, "beam": 2}, 1),
    ],
    ids=["plain", "norm2", "beam"],
)
def test_silent_routers(gates, W, rng):
    spec, params, x, dy, keep_PJ = make("continuous_product", "some", rng, P=3, D=3, W=W)
    spec = dataclasses.replace(spec, router="silent", **gates)
    params, x, dy = cases.grid_case(rng, spec, T=21)
    if spec.beam > 1:  # off the grid, so that no two gates are equal
        noise = rng.normal(0, 0.01, params["threshold"].shape).astype(np.float32)
        params["threshold"] = params["threshold"] + noise
    check(spec, params, x, dy, keep_PJ)


@pytest.mark.slow
@pytest.mark.parametrize("routing", [pytest.param("hard", marks=pytest.mark.slow), "continuous_min"])
def test_many_tokens_few_leaves(routing, rng):
    spec, params, *_, keep_PJ = make(routing, "some", rng, P=3, D=4, W="per_level")
    _, x, dy = cases.grid_case(rng, spec, T=300)
    check(spec, params, x, dy, keep_PJ)


def test_one_token(rng):
    spec, params, x, dy, keep_PJ = make("continuous_product", "some", rng, P=2, D=3, W=2)
    check(spec, params, x[:1], dy[:1], keep_PJ)


@pytest.mark.parametrize("routing", ["hard", "continuous_min", "frozen"])
def test_gather_loses_no_bit_where_no_visited_leaf_is_removed(routing, rng):
    """Threshold 0 on the very tokens it was decided by; grouped agrees to rounding."""
    spec = make(routing, "all", rng, P=2, D=5, W=2, S=1)[0]
    params, x, _ = cases.on_device(cases.grid_case(rng, spec, T=40))
    y, leaf_TP = jax.jit(lambda p, x: tree_ffn(p, x, spec, "gather"))(params, x)[:2]
    counts = np.asarray(usage.leaf_counts(leaf_TP.leaf_TP, 32))
    assert (counts == 0).any()
    pruned_spec, pruned = prune(params, spec, counts > 0)
    run = lambda execution: jax.jit(lambda p, x: tree_ffn(p, x, pruned_spec, execution))(
        cases.on_device(pruned), x
    )
    same, info = run("gather")
    np.testing.assert_array_equal(info.leaf_TP, leaf_TP.leaf_TP)
    np.testing.assert_array_equal(np.asarray(same).view(np.uint32), np.asarray(y).view(np.uint32))
    assert_near(run("grouped")[0], y, "grouped")


def test_a_pruned_layer_can_be_pruned_again(rng):
    spec, params, x, _, keep_PJ = make("frozen", "some", rng, P=3, D=3, W="per_level")
    less_PJ = keep_PJ & (np.cumsum(keep_PJ, axis=1) == 1)
    once_spec, once = prune(params, spec, keep_PJ)
    np.testing.assert_array_equal(present_leaves(once, once_spec), keep_PJ)
    direct_spec, direct = prune(params, spec, less_PJ)
    twice_spec, twice = prune(once, once_spec, less_PJ)
    assert direct_spec == twice_spec and direct_spec.is_one_path
    jax.tree.map(np.testing.assert_array_equal, direct, twice)
    with pytest.raises(InputError, match="pruned before"):
        prune(twice, twice_spec, keep_PJ)


@pytest.mark.parametrize("nodes", [(2, 2, 2, 2), (2, 4, 8, 16), (2, 3, 5, 7), (2, 2, 3, 4)])
def test_initial_weights_have_some_structure_of_these_sizes(nodes):
    spec = PrunedSpec(cases.make_spec(P=2, D=3).shape, nodes=nodes)
    structure = init_structure(spec)
    keep_PJ = np.zeros((2, 8), bool)
    keep_PJ[structure["path"][:, 0], structure["leaf"]] = True
    full = cases.make_spec(P=2, D=3)
    found_spec, found = prune(init_params(jax.random.key(0), full, 4), full, keep_PJ)
    assert found_spec.nodes == nodes
    for name in STRUCTURE:
        np.testing.assert_array_equal(found[name], structure[name])
    y, _ = tree_ffn(init_params(jax.random.key(0), spec, 4), jnp.ones((3, 4)), spec)
    assert y.shape == (3, 4)


def test_balancing_moves_forks_alone(rng):
    spec, params, x, _, keep_PJ = make("hard", "some", rng, P=2, D=3, balance="sign", balance_rate=0.5)
    pruned_spec, pruned = prune(params, spec, keep_PJ)
    leaf_TP = leaves_by_hand(params, x, spec, keep_PJ)
    new = balance_update(cases.on_device(pruned), jnp.asarray(leaf_TP), pruned_spec)
    moved = (np.asarray(new) - pruned["threshold"]) / 0.5
    paths = leaf_TP + 7
    for (p, node), step in zip([(p, n) for p, n in kept_nodes(spec, keep_PJ) if n < 7], moved, strict=True):
        visits = [0, 0]
        for leaf in paths[:, p]:
            while leaf > node:
                above = (leaf - 1) // 2
                if above == node:
                    visits[leaf - (2 * node + 1)] += 1
                leaf = above
        both = all(
            any((q, m) == (p, child) for q, m in kept_nodes(spec, keep_PJ))
            for child in (2 * node + 1, 2 * node + 2)
        )
        assert step == (np.sign(visits[1] - visits[0]) if both else 0)


@pytest.mark.slow
def test_memory_falls(rng):
    """A quarter of the leaves: less memory for the weights, and less at the peak, forward and backward."""
    spec = cases.make_spec("hard", P=1, D=6, W=8)
    params = init_params(jax.random.key(0), spec, width=64)
    keep_PJ = np.arange(64)[None] < 16
    pruned_spec, pruned = prune(params, spec, keep_PJ)
    bytes_of = lambda arrays: sum(array.nbytes for array in jax.tree.leaves(arrays))
    assert bytes_of(pruned) < 0.3 * bytes_of(params)

    def peak(spec, params, execution, n_tokens):
        params = cases.on_device(params)
        structure = {name: params.pop(name) for name in STRUCTURE if name in params}

        def step(params, structure, x):
            loss = lambda params: jnp.sum(tree_ffn({**params, **structure}, x, spec, execution)[0] ** 2)
            return jax.grad(loss)(params)

        x = jax.ShapeDtypeStruct((n_tokens, 64), jnp.float32)
        stats = jax.jit(step).lower(params, structure, x).compile().memory_analysis()
        return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes

    for execution, n_tokens in (("gather", 1), ("grouped", 256)):
        sizes = [peak(s, dict(p), execution, n_tokens) for s, p in ((spec, params), (pruned_spec, pruned))]
        assert sizes[1] < 0.6 * sizes[0], (execution, sizes)


def test_the_choice_is_by_tokens():
    spec = PrunedSpec(cases.make_spec(P=1, D=1).shape, nodes=(1, 1))
    assert [pick_implementation(spec, T, "cpu") for T in (1, 64, 4096)] == ["gather", "grouped", "grouped"]


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda s, p, k: prune(p, s, k[:, :4]), r"keep: bool\[2, 4\] is not allowed; use bool\[2, 8\]"),
        (lambda s, p, k: prune(p, s, k & False), "keep: tree 0 would lose all its leaves"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(2, 4, 8)), "nodes: .* use 4 numbers"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(2, 5, 5, 5)), "nodes: .* is not allowed"),
        (lambda s, p, k: PrunedSpec(s.shape, nodes=(1, 1, 1, 1)), "nodes: .* n_trees = 2"),
        (
            lambda s, p, k: tree_ffn(prune(p, s, k)[1], jnp.ones((1, 6)), prune(p, s, k)[0], "masked"),
            "'masked'",
        ),
        (lambda s, p, k: tree_ffn(p, jnp.ones((1, 6)), prune(p, s, k)[0]), r"w_in: shape .* does not fit"),
    ],
)
def test_mistakes_get_one_sentence(mistake, words, rng):
    spec, params, _, _, keep_PJ = make("hard", "some", rng, P=2, D=3)
    with pytest.raises(InputError, match=words) as caught:
        mistake(spec, params, keep_PJ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("execution", ["gather", "grouped", None])
def test_straight_through_is_not_differentiated(execution, rng):
    spec, params, x, dy, keep_PJ = make("straight_through", "some", rng, P=1, D=2)
    pruned_spec, pruned = prune(params, spec, keep_PJ)
    pruned, x, dy = cases.on_device((pruned, x, dy))
    with pytest.raises(InputError, match="pruned layer"):
        run_backward(pruned, x, dy, pruned_spec, execution)
