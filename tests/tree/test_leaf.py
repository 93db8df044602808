"""The leaf layer: routers, searches and implementations against a float64 oracle, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tree_ffn.errors import InputError
from tree_ffn.models import FFN, update_routing
from tree_ffn.models.dense import DenseSpec, dense_ffn
from tree_ffn.models.ffn import ROUTING_NAMES, ffn_params, products
from tree_ffn.tree import Info
from tree_ffn.tree.leaf import (
    IMPLEMENTATIONS,
    LeafSpec,
    balance_update,
    combine,
    init_params,
    leaf_ffn,
    route,
)
from tree_ffn.tree.leaf.route import choose, log_probabilities
from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS, SEARCHES

E, T = 6, 20
IDS = np.arange(T, dtype=np.int32) % 7
SPECS = {
    "tree": LeafSpec(n_experts=16, expert_width=2, top_k=3),
    "beam": LeafSpec(n_experts=16, expert_width=2, top_k=3, search="beam"),
    "trees": LeafSpec(n_experts=16, expert_width=1, top_k=4, n_trees=4, gate_norm="l1"),
    "trees_beam": LeafSpec(n_experts=24, expert_width=1, top_k=5, n_trees=3, search="beam", gate_norm="none"),
    "one_best": LeafSpec(n_experts=8, expert_width=3, top_k=1, gate_norm="none", activation="tanh"),
    "all": LeafSpec(n_experts=4, expert_width=2, top_k=4),
    "no_decision": LeafSpec(n_experts=3, expert_width=2, top_k=2, n_trees=3, activation="silu"),
    "softmax": LeafSpec(n_experts=5, expert_width=3, top_k=2, router="softmax", gate_norm="l1"),
    "softmax_l2": LeafSpec(n_experts=6, expert_width=1, top_k=3, router="softmax", activation="gelu_tanh"),
    "softmax_plain": LeafSpec(n_experts=5, expert_width=3, top_k=1, router="softmax", gate_norm="none"),
    "random": LeafSpec(n_experts=7, expert_width=2, top_k=2, router="random"),
    "hash": LeafSpec(n_experts=5, expert_width=3, top_k=1, router="hash", gate_norm="none"),
}
KINDS = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])
BALANCED = [name for name, spec in SPECS.items() if spec.router != "hash"]


def case(rng, spec):
    """Weights of every name, biases not 0, inputs and an output's gradient, in float64."""
    units, rows = (spec.n_experts, spec.expert_width), spec.router_rows
    params = {
        "w_in": rng.normal(size=(*units, E)) / E**0.5, "b_in": rng.normal(size=units) / 5,
        "w_out": rng.normal(size=(*units, E)), "b_out": rng.normal(size=E),
    }  # fmt: skip
    if spec.router == "hash":
        params["salt"] = np.int32(7)
    else:
        w = rng.normal(size=(rows, E))
        params |= {"router": {"w": w}} if spec.router == "random" else {"w_router": w}
    if spec.router == "tree":
        params["b_router"] = rng.normal(size=rows) / 3
    if spec.balance_rate:
        params["selection_bias"] = rng.normal(size=rows) / 3
    return params, rng.normal(size=(T, E)), rng.normal(size=(T, E))


def as_jax(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32), tree)


def agree(params, x, dy, spec, implementation, leak=0.0):
    """Outputs, choices and every gradient are the oracle's."""
    wanted = leaf_oracle.leaf_layer(params, x, spec, IDS, dy, leak)
    fixed = {name: value for name, value in as_jax(params).items() if name in ROUTING_NAMES}
    trained = {name: value for name, value in as_jax(params).items() if name not in ROUTING_NAMES}
    given = jnp.float32(leak) if leak else None

    @jax.jit
    def run(trained, x):
        layer = lambda trained, x: leaf_ffn(trained | fixed, x, spec, implementation, jnp.asarray(IDS), given)
        y, back, info = jax.vjp(layer, trained, x, has_aux=True)
        return y, info.leaf_TP, back(jnp.asarray(dy, jnp.float32))

    y, ids, (d_trained, d_x) = run(trained, jnp.asarray(x, jnp.float32))
    assert np.sort(ids, axis=1).tolist() == wanted.chosen
    np.testing.assert_allclose(y, wanted.y, rtol=2e-5, atol=2e-5)
    assert d_trained.keys() == wanted.gradients.keys() - {"x"}
    for name, found in (d_trained | {"x": d_x}).items():
        np.testing.assert_allclose(found, wanted.gradients[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_every_option_is_compared_with_its_definition():
    for field, table in {"router": ROUTERS, "search": SEARCHES, "gate_norm": GATE_NORMS}.items():
        assert {getattr(spec, field) for spec in SPECS.values()} == set(table)


@KINDS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_is_its_definition(spec, implementation, rng):
    agree(*case(rng, spec), spec, implementation)


@pytest.mark.parametrize("name", BALANCED)
def test_the_bias_acts_on_the_choice_alone(name, rng):
    spec = dataclasses.replace(SPECS[name], balance_rate=0.1)
    agree(*case(rng, spec), spec, "masked")


@KINDS
def test_dense_start(spec, rng):
    agree(*case(rng, spec), spec, None, leak=0.4)


@KINDS
def test_a_dense_start_begins_as_the_dense_layer(spec, rng):
    params, x, _ = case(rng, spec)
    flat = {name: params[name].reshape(-1, E) for name in ("w_in", "w_out")}
    flat |= {"b_in": params["b_in"].reshape(-1), "b_out": params["b_out"]}
    x = jnp.asarray(x, jnp.float32)
    y, _ = leaf_ffn(as_jax(params), x, spec, None, jnp.asarray(IDS), jnp.float32(1.0))
    dense, _ = dense_ffn(as_jax(flat), x, DenseSpec(spec.total_units, spec.activation))
    np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-5)


def test_how_long_a_dense_start_lasts():
    spec = LeafSpec(n_experts=4, expert_width=1, top_k=2, dense_start=0.5)
    assert [float(spec.leak_at(done)) for done in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]


def test_ties_take_the_lower_id_and_nan_is_the_lowest():
    for search in ("best", "beam"):
        spec = LeafSpec(n_experts=8, expert_width=1, top_k=3, search=search)
        even = log_probabilities(jnp.zeros((1, 7)), spec)
        assert sorted(choose(even, spec)[0].tolist()) == [0, 1, 2]
        # The node above experts 0 and 1 does not know its side.
        unknown = log_probabilities(jnp.zeros((1, 7)).at[0, 3].set(jnp.nan), spec)
        assert sorted(choose(unknown, spec)[0].tolist()) == [2, 3, 4]
    flat = LeafSpec(n_experts=4, expert_width=1, top_k=2, router="softmax")
    assert choose([jnp.asarray([[jnp.nan, 1.0, 1.0, 0.0]])], flat).tolist() == [[1, 2]]


def test_a_beam_may_miss_the_best_and_a_wide_one_does_not(rng):
    """Of 256 leaves the beam of 8 finds most of the 8 best; one as wide as all leaves finds all."""
    best = LeafSpec(n_experts=256, expert_width=1, top_k=8)
    beam = dataclasses.replace(best, search="beam")
    levels = log_probabilities(jnp.asarray(rng.normal(size=(500, 255)), jnp.float32), best)
    found = np.sort(choose(levels, beam), axis=1)
    wanted = np.sort(choose(levels, best), axis=1)
    shared = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found, wanted)])
    assert 0.8 < shared < 1
    wide = LeafSpec(n_experts=16, expert_width=1, top_k=8, search="beam")
    few = log_probabilities(jnp.asarray(rng.normal(size=(500, 15)), jnp.float32), wide)
    assert (choose(few, wide) == np.sort(choose(few, dataclasses.replace(wide, search="best")), axis=1)).all()


def test_gates_do_not_underflow():
    """Decisions so sure that probabilities of the chosen are 0 in float32 still weigh by ratios."""
    spec = LeafSpec(n_experts=4, expert_width=1, top_k=2)
    params = {"w_router": jnp.zeros((3, E)), "b_router": jnp.asarray([200.0, 0.0, 0.0])}
    ids, gates = route(params, jnp.zeros((1, E)), spec)
    assert ids.tolist() == [[2, 3]]
    np.testing.assert_allclose(gates, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    low = {"w_router": jnp.zeros((3, E)), "b_router": jnp.asarray([0.0, 300.0, 300.0])}
    _, gates = route(low, jnp.zeros((1, E)), dataclasses.replace(spec, top_k=4))
    assert np.isfinite(gates).all() and gates.max() > 0.7


def test_few_tokens_are_gathered_and_a_leak_needs_all_experts(rng):
    spec = SPECS["tree"]
    params, x, _ = case(rng, spec)
    params, x = as_jax(params), jnp.asarray(x, jnp.float32)
    ids, gates = route(params, x, spec)
    text = lambda n: str(jax.make_jaxpr(lambda x: combine(params, x, ids[:n], gates[:n], spec))(x[:n]))
    assert "gather" in text(5) and "gather" not in text(6)  # 5 x 3 rows of 16 experts, and 6 x 3
    with_leak = combine(params, x[:4], ids[:4], gates[:4], spec, leak=jnp.float32(1.0))
    assert not np.allclose(with_leak, combine(params, x[:4], ids[:4], gates[:4], spec))
    assert leaf_ffn(params, x[:0], spec)[0].shape == (0, E)
    with pytest.raises(InputError, match="'gather' computes no expert that is not chosen, and a dense start"):
        combine(params, x, ids, gates, spec, "gather", jnp.float32(1.0))
    with pytest.raises(InputError, match="implementation: 'fast' is not known; use one of: masked, gather"):
        combine(params, x, ids, gates, spec, "fast")


def test_gather_does_its_own_work():
    """XLA counts under a quarter of masked's operations for a token; here A / F is a thirty-second."""
    spec, one = LeafSpec(n_experts=64, expert_width=4, top_k=2), jnp.zeros((1, 32))
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), spec, 32))

    def flops(implementation):
        layer = lambda params, x, ids, gates: combine(params, x, ids, gates, spec, implementation)
        program = jax.jit(layer).lower(params, one, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))
        return program.compile().cost_analysis()["flops"]

    assert 0 < flops("gather") < 0.25 * flops("masked")


@pytest.mark.parametrize("name", ["tree", "beam", "softmax"])
def test_bfloat16_chooses_otherwise_near_ties_only(name, rng):
    spec = SPECS[name]
    params, x, _ = case(rng, spec)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, x))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), low)
    wanted = leaf_oracle.leaf_layer(*exact, spec)
    ids = np.sort(route(*low, spec)[0], axis=1)
    for t in np.flatnonzero((ids != np.asarray(wanted.chosen)).any(axis=1)):
        w, b = exact[0]["w_router"], exact[0].get("b_router", 0.0)
        scores = leaf_oracle.log_p(spec, w @ exact[1][t] + b)
        taken, left = set(ids[t]) - set(wanted.chosen[t]), set(wanted.chosen[t]) - set(ids[t])
        assert max(scores[list(left)]) - min(scores[list(taken)]) < 1e-4, "logits are sums in float32"


def test_balance_moves_the_choice_against_the_load():
    one = {"n_experts": 4, "expert_width": 1, "top_k": 1, "gate_norm": "none"}
    flat = LeafSpec(**one, router="softmax", balance_rate=0.5)
    ids = jnp.asarray([[0], [0], [0], [1]])  # loads 3, 1, 0, 0 about a mean of 1
    assert balance_update({"selection_bias": jnp.zeros(4)}, ids, flat).tolist() == [-0.5, 0.0, 0.5, 0.5]
    # Two trees of depth 2, rows: both roots, then level 1 of each tree. Loads: 2 1 0 0 and 0 0 1 2.
    trees = LeafSpec(n_experts=8, expert_width=1, top_k=2, n_trees=2, balance_rate=0.5)
    ids = jnp.asarray([[0, 1], [0, 7], [6, 7]])
    wanted = [0.5, -0.5, 0.5, 0.0, 0.0, -0.5]
    assert balance_update({"selection_bias": jnp.zeros(6)}, ids, trees).tolist() == wanted
    info = Info(ids, jnp.float32(0.0))
    assert update_routing(trees, {"selection_bias": jnp.zeros(6)}, info)["selection_bias"].tolist() == wanted


@pytest.mark.parametrize("router", ["tree", "softmax"])
def test_balance_evens_the_load(router, rng):
    """A router that prefers one half of its experts by far is brought to use nearly all of them."""
    spec = LeafSpec(n_experts=32, expert_width=1, top_k=4, router=router, balance_rate=0.02)
    params = init_params(jax.random.key(0), spec, 16)
    lean = jnp.zeros(spec.router_rows)
    lean = lean.at[0].set(3.0) if router == "tree" else lean.at[16:].set(3.0)
    x = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)

    @jax.jit
    def ids_of(bias):
        return route(params | {"selection_bias": bias + lean}, x, spec)[0]

    bias = jnp.zeros_like(lean)
    before = np.bincount(np.ravel(ids_of(bias)), minlength=32)
    for _ in range(400):
        bias = balance_update({"selection_bias": bias}, ids_of(bias), spec)
    after = np.bincount(np.ravel(ids_of(bias)), minlength=32)
    assert before[:16].sum() < 0.2 * before.sum() < 0.45 * after.sum() < after[:16].sum()
    assert after.min() > 0.3 * after.mean() > before.min()


@KINDS
def test_initial_weights(spec):
    width = 64
    params = init_params(jax.random.key(0), spec, width, w_in_scale=0.7, w_out_scale=0.05)
    trained = {name: value for name, value in params.items() if name not in ROUTING_NAMES}
    assert ffn_params(spec, width) == sum(value.size for value in jax.tree.leaves(trained))
    assert np.std(params["w_in"]) == pytest.approx(0.7 / 8, rel=0.15)
    assert np.std(params["w_out"]) == pytest.approx(0.05 / spec.active_units**0.5, rel=0.15)
    if spec.router_rows:
        router = params["router"]["w"] if spec.router == "random" else params["w_router"]
        assert router.shape == (spec.router_rows, width)
        assert np.std(router) == pytest.approx(0.7 / 8, rel=0.3)


@KINDS
def test_as_a_linen_module(spec):
    layer, x = FFN(spec), jnp.ones((2, 3, E))
    tokens = jnp.zeros((2, 3), jnp.int32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, tokens)
    assert not set(variables["params"]) & set(ROUTING_NAMES)
    y, info = jax.eval_shape(layer.apply, variables, x, tokens)
    assert y.shape == x.shape and info.leaf_TP.shape == (6, spec.top_k)


def test_products_all_in():
    tree = LeafSpec(n_experts=512, expert_width=6, top_k=16)
    assert (tree.routers_asked, products(tree)) == (511, 192 + 511)
    assert products(dataclasses.replace(tree, search="beam")) == 192 + 1 + 2 + 4 + 8 + 5 * 16
    assert products(dataclasses.replace(tree, router="softmax")) == 192 + 512
    two = LeafSpec(n_experts=64, expert_width=3, top_k=8, n_trees=2, search="beam")
    assert two.routers_asked == 2 + 4 + 8 + 8 + 8
    assert products(DenseSpec(3072)) == 2 * 3072


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n_experts": 6}, "n_experts: 6 is not allowed with n_trees = 1; use n_trees times a power of"),
        ({"n_experts": 12, "n_trees": 5}, "n_experts: 12 is not allowed with n_trees = 5"),
        ({"top_k": 9}, "top_k: 9 is not allowed; a token can use at most n_experts = 8"),
        ({"top_k": 0}, "top_k: 0 is not allowed"),
        ({"router": "softmax", "search": "beam"}, "router: 'softmax' cannot be used with n_trees 1 and"),
        ({"router": "softmax", "n_trees": 2}, "router: 'softmax' cannot be used with n_trees 2"),
        ({"n_trees": 4, "search": "beam"}, "search: 'beam' cannot be used with top_k 2 below n_trees = 4"),
        ({"top_k": 1}, "gate_norm: 'l2' cannot be used with top_k 1, whose gate would always be 1; use"),
        ({"router": "hash"}, "router: 'hash' cannot be used with top_k 2 and balance_rate 0.0"),
        ({"router": "flat"}, "router: 'flat' is not known; use one of: tree, softmax, hash, random"),
        ({"gate_norm": 2}, "gate_norm: 2 is not known; use one of: none, l1, l2"),
        ({"balance_rate": -1.0}, "balance_rate: -1.0 is not allowed"),
        ({"dense_start": 1.5}, "dense_start: 1.5 is not allowed; use a number from 0 to 1"),
        ({"dense_start": float("nan")}, "dense_start: nan is not allowed"),
    ],
)
def test_refused(changed, message):
    with pytest.raises(InputError) as error:
        LeafSpec(**{"n_experts": 8, "expert_width": 2, "top_k": 2, **changed})
    assert str(error.value).startswith(message)


def test_a_hash_needs_ids(rng):
    spec = SPECS["hash"]
    params, x, _ = case(rng, spec)
    with pytest.raises(InputError, match="token_T: is missing; router 'hash' chooses by the ids"):
        leaf_ffn(as_jax(params), jnp.asarray(x, jnp.float32), spec)


def test_equal_layers_have_equal_specs():
    spec = SPECS["tree"]
    assert spec == dataclasses.replace(spec) and hash(spec) == hash(dataclasses.replace(spec))
