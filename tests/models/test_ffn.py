"""The layers behind one interface: against their definitions, and their accounts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.models.kinds import KINDS, SHAPE, random_leaves
from tree_ffn.errors import InputError
from tree_ffn.models import (
    FFN,
    DenseSpec,
    active_share,
    active_units,
    ffn_flops,
    ffn_params,
    total_units,
    update_routing,
)
from tree_ffn.models.ffn import ROUTING_NAMES
from tree_ffn.tree import Info, LeafSpec, PrunedSpec, TreeShape, TreeSpec, leaf_ffn
from tree_ffn.tree.leaf.hashing import hashed
from tree_ffn.tree.path.pruned import init_structure

E = 8
IDS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def init(spec):
    return random_leaves(jax.eval_shape(FFN(spec).init, jax.random.key(0), jnp.ones((2, 3, E)), IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_interface(kind):
    spec = KINDS[kind]
    variables = init(spec)
    x = jax.random.normal(jax.random.key(1), (2, 3, E))
    y, info = jax.jit(FFN(spec).apply)(variables, x, IDS)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert info.leaf_TP.dtype == jnp.int32 and info.leaf_TP.shape[0] == 6
    assert not set(variables["params"]) & set(ROUTING_NAMES)
    assert set(variables.get("routing", {})) <= set(ROUTING_NAMES)
    assert ffn_params(spec, E) == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    low, _ = jax.eval_shape(FFN(spec).apply, variables, x.astype(jnp.bfloat16), IDS)
    assert low.dtype == jnp.bfloat16


def test_units_and_flops():
    assert (total_units(KINDS["hard"]), active_units(KINDS["hard"])) == (28, 12)
    assert active_units(KINDS["narrow"]) == active_units(KINDS["hard"])
    assert active_share(KINDS["leaf"]) == 3 / 8
    assert (total_units(KINDS["pruned"]), active_units(KINDS["pruned"])) == (2 * 9, 12)
    assert ffn_flops(KINDS["dense"], E) == 4 * 24 * E
    assert ffn_flops(KINDS["hard"], E) == 4 * 12 * E
    assert ffn_flops(KINDS["random_tree"], E) == 4 * 12 * E + 2 * (2 * 2) * E  # P D frozen routers more
    assert ffn_flops(KINDS["leaf_hash"], E) == 4 * 5 * E  # a hash is no product
    assert ffn_flops(KINDS["leaf_softmax"], E) == 4 * 6 * E + 2 * 5 * E  # X router rows more
    assert ffn_flops(KINDS["leaf"], E) == 4 * 6 * E + 2 * (1 + 2 + 3) * E  # those that a beam of 3 asks


def test_dense_is_its_formula():
    spec = DenseSpec(width=6, activation="relu")
    p = init(spec)["params"]
    x = np.random.default_rng(0).standard_normal((4, E), np.float32)
    y, _ = FFN(spec).apply({"params": p}, jnp.asarray(x))
    hidden = np.maximum(x @ np.asarray(p["w_in"]).T + np.asarray(p["b_in"]), 0)
    np.testing.assert_allclose(y, hidden @ np.asarray(p["w_out"]) + np.asarray(p["b_out"]), atol=1e-6)


def test_a_tree_without_decisions_is_dense():
    tree = TreeSpec(TreeShape(n_trees=1, depth=0, node_width=6), activation="silu")
    p = init(tree)["params"]
    dense = {
        name: value.reshape(-1, E) if value.ndim == 3 else value.reshape(-1) for name, value in p.items()
    }
    x = jax.random.normal(jax.random.key(2), (5, E))
    y, _ = jax.jit(FFN(tree).apply)({"params": p, "routing": {"threshold": jnp.zeros((1, 1))}}, x)
    expected, _ = jax.jit(FFN(DenseSpec(6, "silu")).apply)({"params": dense}, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_initial_weights_of_a_mixture():
    """w_out's deviation is of the A active units, not of all X W; the router's is w_in's."""
    spec = LeafSpec(n_experts=8, expert_width=16, top_k=2, router="softmax")
    layer = FFN(spec, w_in_scale=0.7, w_out_scale=0.05)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 64)))["params"]
    for name, std in (("w_router", 0.7 / 8), ("w_in", 0.7 / 8), ("w_out", 0.05 / 32**0.5)):
        assert np.std(params[name]) == pytest.approx(std, rel=0.1), name
    assert not np.asarray(params["b_in"]).any() and not np.asarray(params["b_out"]).any()


@pytest.mark.parametrize("norm", ["none", "l1", "l2", "rms"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_flat_router_is_the_definition_of_a_mixture(top_k, norm):
    norm = "none" if top_k == 1 else norm
    spec = LeafSpec(
        n_experts=4, expert_width=3, top_k=top_k, router="softmax", gate_norm=norm, balance_rate=1e-3,
        activation="tanh",
    )  # fmt: skip
    variables = init(spec)
    p = {k: np.asarray(v, np.float64) for k, v in {**variables["params"], **variables["routing"]}.items()}
    x = np.random.default_rng(3).standard_normal((16, E), np.float32)
    y, info = jax.jit(FFN(spec).apply)(variables, jnp.asarray(x))

    scores = x @ p["w_router"].T
    gates = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = np.zeros((16, E))
    for t in range(16):
        chosen = np.argsort(-(gates[t] + p["selection_bias"]))[:top_k]
        assert set(chosen) == set(np.asarray(info.leaf_TP[t]))
        of_token = gates[t, chosen]
        total = {
            "none": 1.0, "l1": of_token.sum(), "l2": np.linalg.norm(of_token),
            "rms": np.sqrt(np.mean(of_token**2)),
        }[norm]  # fmt: skip
        for e in chosen:
            hidden = np.tanh(p["w_in"][e] @ x[t] + p["b_in"][e])
            expected[t] += gates[t, e] / total * (hidden @ p["w_out"][e])
    np.testing.assert_allclose(y, expected + p["b_out"], atol=1e-5)


def test_the_gradient_of_a_mixture_goes_to_the_chosen_and_to_the_router():
    spec = LeafSpec(
        n_experts=4, expert_width=3, top_k=1, router="softmax", gate_norm="none", balance_rate=0.1
    )
    variables = init(spec)
    params = {**variables["params"], **variables["routing"]}
    x = jax.random.normal(jax.random.key(4), (1, E))

    def loss(params):
        y, info = leaf_ffn(params, x, spec)
        return jnp.sum(jnp.square(y)), info

    grads, info = jax.jit(jax.grad(loss, has_aux=True))(params)
    touched = np.abs(np.asarray(grads["w_in"])).sum(axis=(1, 2)) > 0
    assert touched.tolist() == [e == int(info.leaf_TP[0, 0]) for e in range(4)]
    assert np.abs(np.asarray(grads["w_router"])).sum() > 0
    assert not np.asarray(grads["selection_bias"]).any()  # the choice is not differentiated


def test_balancing_moves_against_the_load_and_works_stacked():
    moe = LeafSpec(
        n_experts=4, expert_width=3, top_k=1, router="softmax", gate_norm="none", balance_rate=0.25
    )
    chosen = jnp.asarray([[0], [0], [0], [1], [2], [3], [1], [2]], jnp.int32)  # mean load 2
    info = Info(chosen)
    update = jax.jit(update_routing, static_argnums=0)
    new = update(moe, {"selection_bias": jnp.zeros(4)}, info)
    assert new["selection_bias"].tolist() == [-0.25, 0.0, 0.0, 0.25]

    tree = TreeSpec(SHAPE, balance_rate=0.5)
    leaves = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 11, 2)), jnp.int32)
    routing = {"threshold": jnp.zeros((3, 2, 7))}
    stacked = update(tree, routing, Info(leaves))
    for i in range(3):
        alone = update(tree, {"threshold": routing["threshold"][i]}, Info(leaves[i]))
        np.testing.assert_array_equal(alone["threshold"], stacked["threshold"][i])
    assert np.asarray(stacked["threshold"]).any()
    pruned = PrunedSpec(SHAPE, nodes=(2, 3, 4), balance_rate=0.5)
    one = jax.tree.map(jnp.asarray, init_structure(pruned)) | {"threshold": jnp.zeros(5)}
    two = update(pruned, jax.tree.map(lambda a: jnp.stack([a, a]), one), Info(leaves[:2]))
    for i in range(2):
        alone = update(pruned, one, Info(leaves[i]))
        np.testing.assert_array_equal(alone["threshold"], two["threshold"][i])
    assert np.asarray(two["threshold"]).any() and two["leaf"].shape == (2, 4)
    untouched = TreeSpec(SHAPE)
    assert update_routing(untouched, routing, Info(leaves)) is routing


def experts(**fields):
    return LeafSpec(**{"n_experts": 4, "expert_width": 2, "top_k": 2} | fields)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DenseSpec(0), "width: 0 "),
        (lambda: DenseSpec(4, "swish"), "activation: 'swish' is not known; use one of: gelu,"),
        (lambda: experts(top_k=5), "top_k: 5 is not allowed; a token can use at most n_experts = 4"),
        (lambda: experts(balance_rate=-1.0), "balance_rate: -1.0 "),
        (lambda: experts(dense_start=1.5), "dense_start: 1.5 is not allowed; use a number from 0 to 1"),
        (lambda: experts(dense_start=float("nan")), "dense_start: nan "),
    ],
)
def test_bad_specs_are_refused(make, words):
    with pytest.raises(InputError, match=f"^{words.replace('(', '.')}"):
        make()


def test_hashed_experts_are_their_definition():
    spec = LeafSpec(n_experts=5, expert_width=3, top_k=1, activation="tanh", gate_norm="none", router="hash")
    variables = init(spec)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"].items()}
    x = np.random.default_rng(4).standard_normal((40, E), np.float32)
    ids = np.r_[np.arange(35), 50_256, 2**31 - 1, 7, 7, 7].astype(np.int32)
    routing = {"salt": jnp.int32(123_456_789)}
    layer = FFN(spec)
    y, info = jax.jit(layer.apply)({**variables, "routing": routing}, jnp.asarray(x), jnp.asarray(ids))
    expert = np.array([oracle.hashed(token, 123_456_789, 5) for token in ids])
    np.testing.assert_array_equal(info.leaf_TP[:, 0], expert)
    hidden = [np.tanh(p["w_in"][e] @ x[t] + p["b_in"][e]) @ p["w_out"][e] for t, e in enumerate(expert)]
    np.testing.assert_allclose(y, np.array(hidden) + p["b_out"], atol=1e-5)


def test_hashes_of_layers_differ_and_fill_the_experts():
    spec = LeafSpec(n_experts=32, expert_width=2, top_k=1, gate_norm="none", router="hash")
    ids = jnp.arange(50_257)
    first = jax.jit(FFN(spec).init)
    layers = (first(jax.random.key(seed), jnp.ones((1, E)), ids[:1]) for seed in (0, 1))
    one, other = (np.asarray(hashed(ids, layer["routing"]["salt"], 32)) for layer in layers)
    assert 0.02 < np.mean(one == other) < 0.045  # 1 / 32 by chance
    counts = np.bincount(one, minlength=32)
    assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()


def test_hashing_needs_ids_and_one_fixed_choice():
    spec = KINDS["leaf_hash"]
    with pytest.raises(InputError, match="token_T: is missing"):
        FFN(spec).apply(init(spec), jnp.ones((2, 3, E)))
    for changed in ({"top_k": 2}, {"balance_rate": 0.1}):
        with pytest.raises(InputError, match="router: 'hash' cannot be used with top_k"):
            dataclasses.replace(spec, **changed)
