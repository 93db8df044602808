"""The leaf layer: routers against a float64 oracle, a sample of layers whole, and what specs refuse."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import leaf_oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.models import FFN, update_routing
from tree_ffn.models.dense import DenseSpec, dense_ffn
from tree_ffn.models.ffn import ROUTING_NAMES, ffn_params, products, split_params
from tree_ffn.tree import IMPLEMENTATIONS, Info, LeafSpec, leaf_ffn
from tree_ffn.tree.leaf import balance_update, init_params, route
from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS
from tree_ffn.tree.usage import visit_counts

E, T = 6, 20
SPECS = cases.LEAVES
IDS = cases.token_ids(T)
every_layer = pytest.mark.parametrize("name", SPECS)
routed = cases.jit(route, static_argnums=2)


def by_expert(array_TK, ids_TK):
    """Columns in ascending order of the experts."""
    return np.take_along_axis(np.asarray(array_TK), np.argsort(ids_TK, axis=1), axis=1)


def check_route(params, x, dg, spec):
    """Choices, gates, and gradients of sum(dg * gates) are the oracle's."""
    token = cases.token_ids(len(x))
    ids, gates, grads = leaf_oracle.route(params, x, spec, token, dg)
    trained, fixed = split_params(cases.on_device(params))

    @cases.jit
    def run(trained, x, dg):
        def gates_of(trained, x):
            ids_TK, gates_TK = route(trained | fixed, x, spec, jnp.asarray(token))
            ascending = jnp.argsort(ids_TK, axis=1)
            return jnp.take_along_axis(gates_TK, ascending, axis=1), ids_TK

        gates, back, found = jax.vjp(gates_of, trained, x, has_aux=True)
        return found, gates, back(dg)

    found, got, (d_trained, dx) = run(trained, *cases.on_device((x, dg)))
    assert found.dtype == jnp.int32 and got.dtype == jnp.float32
    np.testing.assert_array_equal(np.sort(found, axis=1), ids)
    cases.assert_near(got, gates, "gates")
    routers = {name: grad for name, grad in d_trained.items() if name in ("w_router", "b_router")}
    cases.assert_same_gradients({**routers, "x": dx}, grads)
    assert not any(np.any(grad) for name, grad in d_trained.items() if name not in routers)


def test_every_option_is_compared_with_its_definition():
    for field, table in {"router": ROUTERS, "gate_norm": GATE_NORMS}.items():
        assert {getattr(spec, field) for spec in SPECS.values()} == set(table)


@every_layer
@pytest.mark.parametrize("n_tokens", [0, T])
def test_routers_choose_and_weigh(name, n_tokens, rng):
    params, x, _ = cases.leaf_case(rng, SPECS[name], n_tokens)
    check_route(params, x, rng.normal(size=(n_tokens, SPECS[name].top_k)), SPECS[name])


BALANCED = [name for name, spec in SPECS.items() if spec.router_rows and spec.top_k < spec.n_experts]


@pytest.mark.parametrize("name", BALANCED)
def test_the_bias_acts_on_the_choice_alone(name, rng):
    """Of trees it is added to the logits, of flat routers to the probabilities; gates have none of it."""
    spec = dataclasses.replace(SPECS[name], balance_rate=0.1)
    params, x, _ = cases.leaf_case(rng, spec, 3 * T)
    check_route(params, x, rng.normal(size=(3 * T, spec.top_k)), spec)
    without = {name: value for name, value in params.items() if name != "selection_bias"}
    assert (leaf_oracle.route(params, x, spec)[0] != leaf_oracle.route(without, x, spec)[0]).any()


def check_layer(params, x, dy, spec, implementation, leak=0.0):
    wanted, ids, grads = leaf_oracle.leaf_layer(params, x, spec, IDS, dy, leak)
    trained, fixed = split_params(cases.on_device(params))
    given = jnp.float32(leak) if leak else None

    @cases.jit
    def run(trained, x, dy):
        layer = lambda trained, x: leaf_ffn(trained | fixed, x, spec, implementation, jnp.asarray(IDS), given)
        y, back, info = jax.vjp(layer, trained, x, has_aux=True)
        return y, info.leaf_TP, back(dy)

    y, found, (d_trained, dx) = run(trained, *cases.on_device((x, dy)))
    np.testing.assert_array_equal(np.sort(found, axis=1), ids)
    cases.assert_near(y, wanted, "y")
    assert {*d_trained, "x"} == grads.keys()
    for parameter, grad in {**d_trained, "x": dx}.items():
        cases.assert_near(grad, grads[parameter], parameter)


@pytest.mark.parametrize("name, implementation", [*zip(SPECS, itertools.cycle(IMPLEMENTATIONS))])
def test_layers_whole(name, implementation, rng):
    check_layer(*cases.leaf_case(rng, SPECS[name]), SPECS[name], implementation)


@pytest.mark.parametrize("name", ["trees", "one_best", "softmax", "hash"])
def test_dense_start(name, rng):
    check_layer(*cases.leaf_case(rng, SPECS[name]), SPECS[name], None, leak=0.4)


@pytest.mark.parametrize("name", ["tree", "random", "hash"])
def test_a_dense_start_begins_as_the_dense_layer(name, rng):
    spec = SPECS[name]
    params, x, _ = cases.on_device(cases.leaf_case(rng, spec))
    flat = {part: params[part].reshape(-1, E) for part in ("w_in", "w_out")}
    flat |= {"b_in": params["b_in"].reshape(-1), "b_out": params["b_out"]}
    layer = lambda params, x: leaf_ffn(params, x, spec, None, jnp.asarray(IDS), jnp.float32(1.0))[0]
    y = cases.jit(layer)(params, x)
    dense = cases.jit(lambda p, x: dense_ffn(p, x, DenseSpec(spec.total_units, spec.activation))[0])(flat, x)
    np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-5)


def test_how_long_a_dense_start_lasts():
    spec = LeafSpec(n_experts=4, expert_width=1, top_k=2, dense_start=0.5)
    assert [float(spec.leak_at(done)) for done in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(InputError, match="done: the layer .* has no dense start; leave it out"):
        spec.after_start.leak_at(0.0)


@pytest.mark.parametrize("done", [300, -0.1, float("nan"), jnp.float32(1.5), np.array([0.0, 2.0])])
def test_done_is_a_share(done):
    """A step's number would end the start at once, and silently."""
    with pytest.raises(InputError, match="done: .* is not allowed; use the share of the training that is"):
        LeafSpec(n_experts=4, expert_width=1, top_k=2, dense_start=0.5).leak_at(done)


def chosen(logits_TR, spec, **routing) -> np.ndarray:
    """Experts of tokens with these logits, in ascending order."""
    n_rows = spec.router_rows
    params = {"w_router": jnp.eye(n_rows), "b_router": jnp.zeros(n_rows), **routing}
    return np.sort(routed(params, jnp.asarray(logits_TR, jnp.float32), spec)[0], axis=1)


def test_ties_take_the_lower_id_and_nan_is_the_lowest():
    spec = LeafSpec(n_experts=8, expert_width=1, top_k=3)
    of_biases = lambda bias_R: chosen(np.zeros((1, 7)), spec, b_router=jnp.asarray(bias_R))[0].tolist()
    assert of_biases(np.zeros(7)) == [0, 1, 2]
    # The node above experts 0 and 1 does not know its side.
    assert of_biases(np.where(np.arange(7) == 3, np.nan, 0.0)) == [2, 3, 4]
    assert of_biases(np.full(7, np.nan)) == [0, 1, 2]
    flat = LeafSpec(n_experts=4, expert_width=1, top_k=2, router="softmax", balance_rate=0.1)
    bias = jnp.asarray([jnp.nan, 1.0, 1.0, 0.0])
    assert chosen(np.zeros((1, 4)), flat, selection_bias=bias).tolist() == [[1, 2]]


@pytest.mark.parametrize("name", ["tree", "trees", "softmax"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_with_its_token(name, implementation, rng):
    params, x, _ = cases.on_device(cases.leaf_case(rng, SPECS[name]))
    layer = cases.jit(lambda x: leaf_ffn(params, x, SPECS[name], implementation)[0])
    y, spoilt = layer(x), layer(x.at[3].set(jnp.nan))
    assert np.isnan(spoilt[3]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 3, axis=0), np.delete(y, 3, axis=0))


def test_a_beam_may_miss_the_best_and_a_wide_one_does_not(rng):
    """Of 256 leaves a beam of 8 finds most of the 8 best; of 16, where it keeps all nodes above, all."""
    for spec in (LeafSpec(n_experts=n, expert_width=1, top_k=8) for n in (256, 16)):
        logits = rng.normal(size=(500, spec.router_rows))
        best = np.array([leaf_oracle.best(leaf_oracle.log_p(spec, r), spec.top_k) for r in logits])
        shared = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(chosen(logits, spec), best)])
        assert 0.8 < shared < 1 if spec.n_experts == 256 else shared == 1


def test_gates_do_not_underflow():
    """Decisions so sure that probabilities of the chosen are 0 in float32 still weigh by ratios."""
    spec = LeafSpec(n_experts=4, expert_width=1, top_k=2)
    params = {"w_router": jnp.zeros((3, E)), "b_router": jnp.asarray([200.0, 0.0, 0.0])}
    ids, gates = routed(params, jnp.zeros((1, E)), spec)
    assert ids.tolist() == [[2, 3]]
    np.testing.assert_allclose(gates, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    low = {"w_router": jnp.zeros((3, E)), "b_router": jnp.asarray([0.0, 300.0, 300.0])}
    _, gates = routed(low, jnp.zeros((1, E)), dataclasses.replace(spec, top_k=4))
    assert np.isfinite(gates).all() and gates.max() > 0.7


@pytest.mark.parametrize("name", ["tree", "trees", "softmax"])
def test_bfloat16_chooses_otherwise_near_ties_only(name, rng):
    """Logits are float32 sums of exact products: scores of what is swapped differ by their rounding."""
    spec = SPECS[name]
    params, x, _ = cases.leaf_case(rng, spec, T=400)
    low = cases.on_device((params, x), jnp.bfloat16)
    exact, x = jax.tree.map(lambda a: np.asarray(a, np.float64), low)
    wanted, _, _ = leaf_oracle.route(exact, x, spec)
    ids = np.sort(cases.jit(lambda params, x: route(params, x, spec)[0])(*low), axis=1)
    w, b = exact["w_router"], exact.get("b_router", 0.0)
    for t in np.flatnonzero((ids != wanted).any(axis=1)):
        scores = leaf_oracle.log_p(spec, w @ x[t] + b)
        bound = (E + 4) * 2.0**-24 * (np.abs(w) @ np.abs(x[t]) + np.abs(b)).max() * max(1, spec.depth)
        taken, left = set(ids[t]) - set(wanted[t]), set(wanted[t]) - set(ids[t])
        assert max(scores[list(left)]) - min(scores[list(taken)]) < 2 * bound
    assert (ids != wanted).any(axis=1).mean() < 0.01


def test_balance_moves_the_choice_against_the_load():
    one = {"n_experts": 4, "expert_width": 1, "top_k": 1, "gate_norm": "none"}
    flat = LeafSpec(**one, router="softmax", balance_rate=0.5)
    ids = jnp.asarray([[0], [0], [0], [1]])  # loads 3, 1, 0, 0 about a mean of 1
    update = cases.jit(balance_update, static_argnums=2)
    moved = update({"selection_bias": jnp.zeros(4)}, visit_counts(ids, 1, 4), flat)
    assert moved.tolist() == [-0.5, 0.0, 0.5, 0.5]
    # Two trees of depth 2, rows: both roots, then level 1 of each tree. Loads: 2 1 0 0 and 0 0 1 2.
    trees = LeafSpec(n_experts=8, expert_width=1, top_k=2, n_trees=2, balance_rate=0.5)
    ids = jnp.asarray([[0, 1], [0, 7], [6, 7]])
    wanted = [0.5, -0.5, 0.5, 0.0, 0.0, -0.5]
    counts = visit_counts(ids, 1, 8)
    assert update({"selection_bias": jnp.zeros(6)}, counts, trees).tolist() == wanted
    updated = cases.jit(update_routing, static_argnums=0)(trees, {"selection_bias": jnp.zeros(6)}, Info(ids))
    assert updated["selection_bias"].tolist() == wanted


@pytest.mark.parametrize("router", ["tree", "softmax", "product_keys"])
def test_balance_evens_the_load(router, rng):
    """A router that prefers one half of its experts by far is brought to use nearly all of them."""
    rate = 0.02 if router == "tree" else 0.001  # of logits, and of probabilities of 1 / 32
    spec = LeafSpec(n_experts=32, expert_width=1, top_k=4, router=router, balance_rate=rate)
    params = cases.first_weights(init_params, spec, 16)
    lean = jnp.zeros(spec.balanced)
    lean = lean.at[0].set(3.0) if router == "tree" else lean.at[16:].set(0.1)
    x = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)
    ids_of = cases.jit(lambda bias: route(params | {"selection_bias": bias + lean}, x, spec)[0])
    update = cases.jit(lambda bias, ids: update_routing(spec, {"selection_bias": bias}, Info(ids)))
    bias = jnp.zeros_like(lean)
    before = np.bincount(np.ravel(ids_of(bias)), minlength=32)
    for _ in range(400):
        bias = update(bias, ids_of(bias))["selection_bias"]
    after = np.bincount(np.ravel(ids_of(bias)), minlength=32)
    assert before[:16].sum() < 0.2 * before.sum() < 0.45 * after.sum() < after[:16].sum()
    assert after.min() > 0.3 * after.mean() > before.min()


@every_layer
def test_initial_weights(name):
    spec, width = SPECS[name], 64
    params = cases.first_weights(init_params, spec, width, w_in_scale=0.7, w_out_scale=0.05)
    assert ffn_params(spec, width) == sum(value.size for value in jax.tree.leaves(split_params(params)[0]))
    assert np.std(params["w_in"]) == pytest.approx(0.7 / 8, rel=0.15)
    assert np.std(params["w_out"]) == pytest.approx(0.05 / spec.active_units**0.5, rel=0.15)
    if spec.router_rows:
        router = params["router"]["w"] if spec.router == "random" else params["w_router"]
        assert router.shape == (spec.router_rows, width)
        assert np.std(router) == pytest.approx(0.7 / 8, rel=0.3)


@every_layer
def test_as_a_linen_module(name):
    layer, x = FFN(SPECS[name]), jnp.ones((2, 3, E))
    tokens = jnp.zeros((2, 3), jnp.int32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, tokens)
    assert not set(variables["params"]) & set(ROUTING_NAMES)
    y, info = jax.eval_shape(layer.apply, variables, x, tokens)
    assert y.shape == x.shape and info.leaf_TP.shape == (6, SPECS[name].top_k)


def test_products_all_in():
    tree = LeafSpec(n_experts=512, expert_width=6, top_k=16)
    assert (tree.router_rows, products(tree)) == (511, 192 + 1 + 2 + 4 + 8 + 5 * 16)
    assert products(dataclasses.replace(tree, router="softmax")) == 192 + 512
    assert products(dataclasses.replace(tree, router="product_keys")) == 192 + 16 + 32
    two = LeafSpec(n_experts=64, expert_width=3, top_k=8, n_trees=2)
    assert two.routers_asked == 2 + 4 + 8 + 8 + 8
    assert products(DenseSpec(3072)) == 2 * 3072


ONE = {"n_experts": 1, "top_k": 1, "gate_norm": "none"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n_experts": 6}, "n_experts: 6 is not allowed with n_trees = 1; use n_trees times a power of"),
        ({"n_experts": 12, "n_trees": 5}, "n_experts: 12 is not allowed with n_trees = 5"),
        ({"top_k": 9}, "top_k: 9 is not allowed; a token can use at most n_experts = 8"),
        ({"top_k": 0}, "top_k: 0 is not allowed"),
        ({"router": "softmax", "n_trees": 2}, "n_trees: 2 cannot be used with router 'softmax', which has"),
        ({"n_trees": 4}, "n_trees: 4 is not allowed with top_k = 2, by which trees are searched"),
        ({"top_k": 1}, "gate_norm: 'l2' cannot be used with top_k 1, whose gate would always be 1; use"),
        ({"router": "hash"}, "router: 'hash' cannot be used with top_k 2, balance_rate 0.0 and"),
        ({"router": "flat"}, "router: 'flat' is not known; use one of: tree, softmax"),
        ({"gate_norm": 2}, "gate_norm: 2 is not known; use one of: none, l1, l2"),
        ({"balance_rate": -1.0}, "balance_rate: -1.0 is not allowed"),
        (
            {"n_trees": 8, "top_k": 8, "balance_rate": 0.1},
            "balance_rate: 0.1 cannot be used with top_k = n_experts = 8, where every token uses all",
        ),
        (
            {"n_experts": 2, "balance_rate": 0.1},
            "balance_rate: 0.1 cannot be used with top_k = n_experts = ",
        ),
        (
            {"n_experts": 7, "router": "product_keys"},
            "n_experts: 7 is not allowed with router 'product_",
        ),
        ({**ONE, "router": "softmax"}, "router: 'softmax' cannot be used with n_experts 1, which needs none"),
        ({**ONE, "dense_start": 0.2}, "dense_start: 0.2 cannot be used with n_trees = n_experts = 1 and"),
        ({"n_trees": 8, "top_k": 8, "gate_norm": "rms"}, "gate_norm: 'rms' cannot be used with n_trees = "),
        ({"dense_start": 1.5}, "dense_start: 1.5 is not allowed; use a number from 0 to 1"),
        ({"dense_start": float("nan")}, "dense_start: nan is not allowed"),
    ],
)
def test_refused(changed, message):
    with pytest.raises(InputError) as error:
        LeafSpec(**{"n_experts": 8, "expert_width": 2, "top_k": 2, **changed})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "ids", [np.zeros(1, np.int32), np.zeros((T, 1), np.int32), np.zeros(T, np.float32), None]
)
def test_a_hash_needs_an_id_for_every_token(ids, rng):
    params, x, _ = cases.on_device(cases.leaf_case(rng, SPECS["hash"]))
    message = "token_T: is missing; router 'hash' chooses by the ids"
    if ids is not None:
        message = rf"token_T: shape .* of the {T} tokens, int32 \[{T}\]"
    with pytest.raises(InputError, match=message):
        leaf_ffn(params, x, SPECS["hash"], None, None if ids is None else jnp.asarray(ids))


def test_equal_layers_have_equal_specs():
    spec = SPECS["tree"]
    of_numpy = LeafSpec(n_experts=np.int64(16), expert_width=np.int8(2), top_k=np.uint8(3))
    assert of_numpy == spec and (of_numpy.depth, type(of_numpy.top_k)) == (4, int)
    assert spec == dataclasses.replace(spec) and hash(spec) == hash(dataclasses.replace(spec))
