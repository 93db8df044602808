"""The mesh, the exact specs of every leaf, and equal losses on any mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.training.tiny import random_batch
from tree_ffn.config import make_config
from tree_ffn.errors import InputError
from tree_ffn.models.from_config import PRESETS, model_spec_from_config
from tree_ffn.models.spec import DenseSpec, ModelSpec
from tree_ffn.training import sharding, step
from tree_ffn.training.optimizer import OptimSpec, learning_rate, make_optimizer
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeShape, TreeSpec

BOTH = ("data", "model")
# Specs of weights by kind of layer, where trees, experts or units divide by "model".
WHOLE, EVERYWHERE, SPLIT, SPREAD = (
    P(None, "model"),
    P(),
    P(None, "model", None, "data"),
    P(None, None, None, BOTH),
)
TREES = {"w_in": SPLIT, "w_out": SPLIT, "b_in": WHOLE}
DENSE = {"w_in": P(None, "model", "data"), "w_out": P(None, "model", "data"), "b_in": WHOLE}
FLAT = TREES | {"w_router": P(None, None, "data")}
ROUTED = FLAT | {"b_router": EVERYWHERE}
# One tree cannot be split over two devices: its weights are spread over E, for storage.
ONE_TREE = {"w_in": SPREAD, "w_out": SPREAD, "b_in": EVERYWHERE}
NARROW_TREES = TreeSpec(TreeShape(n_trees=4, depth=2), balance_rate=1e-3)
WIDE_TREE = TreeSpec(TreeShape(n_trees=1, depth=2, node_width=3), routing="straight_through")
RANDOM_TREES = TreeSpec(TreeShape(n_trees=4, depth=2), router="frozen")
PRUNED_TREES = PrunedSpec(TreeShape(n_trees=4, depth=2), router="frozen", nodes=(4, 4, 5))
LEAVES = LeafSpec(n_experts=8, expert_width=3, top_k=3, balance_rate=1e-2, dense_start=0.2)
MIXTURE = LeafSpec(n_experts=4, expert_width=8, top_k=2, router="softmax", balance_rate=1e-3)
LAYERS = (NARROW_TREES, WIDE_TREE, RANDOM_TREES, MIXTURE, DenseSpec(24), PRUNED_TREES, LEAVES)
MODEL = ModelSpec(256, 16, 32, len(LAYERS), 2, LAYERS)
OPTIM = OptimSpec(steps=10, lr=3e-3, warmup_steps=2)


def abstract_state(model=MODEL):
    init = functools.partial(step.init_state, model=model, optimizer=make_optimizer(OPTIM))
    return jax.eval_shape(init, jax.random.key(0))


def specs(tree, mesh):
    flat, _ = jax.tree_util.tree_flatten_with_path(sharding.shardings_for(tree, mesh))
    return {sharding.path_name(path): place.spec for path, place in flat}


def run_specs(ffn: dict, routing: dict, run: str) -> dict:
    """Expected specs of one run's params and routing."""
    layer = {
        "ln_1/scale": P(), "ln_1/bias": P(), "ln_2/scale": P(), "ln_2/bias": P(),
        "attn/w_qkv": P(None, "data", None, "model"), "attn/b_qkv": P(None, None, "model"),
        "attn/w_out": P(None, "model", None, "data"), "attn/b_out": P(), "ffn/b_out": P(),
    }  # fmt: skip
    layer |= {f"ffn/{name}": spec for name, spec in ffn.items()}
    expected = {f"params/{run}/{name}": spec for name, spec in layer.items()}
    return expected | {f"routing/{run}/ffn/{name}": spec for name, spec in routing.items()}


def with_the_rest(runs: dict) -> dict:
    """Expected specs of a whole state: of its runs, what stands around them, and the moments of all."""
    expected = {"step": P(), "params/embed/tokens": P("model", "data"), "params/ln_f/scale": P()}
    expected |= {"params/embed/positions": P(None, "data"), "params/ln_f/bias": P()} | runs
    moments = {name.removeprefix("params/"): spec for name, spec in expected.items() if "params/" in name}
    for moment in ("mu", "nu"):
        expected |= {f"opt_state/1/{moment}/{name}": spec for name, spec in moments.items()}
    return expected | {"opt_state/1/count": P(), "opt_state/3/count": P()}


def expected_specs():
    runs = run_specs(TREES, {"threshold": WHOLE}, "run_0")
    runs |= run_specs(ONE_TREE, {"threshold": EVERYWHERE}, "run_1")
    runs |= run_specs(TREES, {"threshold": WHOLE, "router/w": SPLIT}, "run_2")
    runs |= run_specs(FLAT, {"selection_bias": EVERYWHERE}, "run_3") | run_specs(DENSE, {}, "run_4")
    # 13 units do not divide by two devices: E is spread over both axes. 8 deciding nodes do.
    spread_units = {"w_in": P(None, None, BOTH), "w_out": P(None, None, BOTH), "b_in": EVERYWHERE}
    structure = dict.fromkeys(("child", "path", "leaf"), EVERYWHERE)
    runs |= run_specs(spread_units, {"threshold": WHOLE, "router/w": WHOLE, **structure}, "run_5")
    return with_the_rest(runs | run_specs(ROUTED, {"selection_bias": EVERYWHERE}, "run_6"))


def test_a_head_of_its_own_is_placed_like_the_token_table():
    mesh = sharding.make_mesh(data=4, model=2)
    assert sharding.spec_of("params/embed/head", (256, 32), mesh) == P("model", "data")


def test_every_leaf_has_exactly_this_spec():
    assert specs(abstract_state(), sharding.make_mesh(data=4, model=2)) == expected_specs()


@pytest.mark.parametrize(
    "shape,mesh,spec",
    [
        ((2, 6, 7, 16), (2, 2), P(None, "model", None, "data")),  # whole trees
        ((2, 6, 7, 15), (2, 2), P(None, "model")),  # ... of a width that does not divide
        ((2, 1, 7, 16), (4, 2), P(None, None, None, BOTH)),  # one tree: E over all devices
        ((2, 1, 8, 12), (4, 2), P(None, None, BOTH)),  # E does not divide: U
        ((2, 1, 7, 12), (4, 2), P()),  # neither does
        ((2, 1, 7, 16), (8, 1), P(None, "model", None, "data")),  # trivially whole: "model" is one device
    ],
)
def test_tree_weights_take_the_first_spec_that_divides(shape, mesh, spec):
    assert sharding.spec_of("params/run_0/ffn/w_in", shape, sharding.make_mesh(*mesh)) == spec


OF_PRESETS = {
    "dense": ({"ffn.kind": "dense"}, DENSE, {}),
    "leaf": ({"ffn.kind": "leaf"}, ROUTED, {}),
    "moe": ({"ffn.kind": "leaf", "ffn.router": "softmax"}, FLAT, {}),
    "path": ({"ffn.kind": "tree", "ffn.n_trees": 8, "ffn.node_width": (4,)}, TREES, {"threshold": WHOLE}),
    "one_tree": ({"ffn.kind": "tree"}, ONE_TREE, {"threshold": EVERYWHERE}),
}


@pytest.mark.parametrize(
    "preset, kind",
    [
        pytest.param(preset, kind, marks=() if kind == "leaf" or preset == "opt_125m" else pytest.mark.slow)
        for preset in PRESETS
        for kind in OF_PRESETS
    ],
)
def test_every_preset_has_exactly_these_specs(preset, kind):
    """And each of eight devices an eighth of weights and moments, but for what "model" does not split."""
    values, ffn, routing = OF_PRESETS[kind]
    config = make_config({"model.preset": preset, "model.vocab_multiple": 64} | values)
    state = abstract_state(model_spec_from_config(config, 50_257))
    for data, model in ((8, 1), (2, 4)):
        mesh, whole = sharding.make_mesh(data, model), kind == "one_tree" and model == 1
        of_run = (TREES, {"threshold": WHOLE}) if whole else (ffn, routing)
        assert specs(state, mesh) == with_the_rest(run_specs(*of_run, "run_0"))
        stored = here = 0
        for path, array in jax.tree_util.tree_leaves_with_path(sharding.placed(state, mesh)):
            apart = re.search("w_router|positions", sharding.path_name(path))
            stored += array.size * (8 // data if apart else 1)
            here += math.prod(array.sharding.shard_shape(array.shape))
        assert here < 1.02 * stored / 8


def test_rules_are_strict():
    mesh = sharding.make_mesh(data=4, model=2)
    with pytest.raises(KeyError, match="no rule of RULES matches params/run_0/attn/new"):
        sharding.spec_of("params/run_0/attn/new", (3,), mesh)
    with pytest.raises(KeyError, match="fits no spec"):
        sharding.spec_of("w", (3,), mesh, rules=((r"w", (P("data"),)),))


def test_mesh_takes_what_is_left():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
    assert dict(sharding.make_mesh(2, -1).shape) == {"data": 2, "model": 4}
    assert dict(sharding.make_mesh().shape) == {"data": 8, "model": 1}
    assert sharding.make_mesh(2, 1).devices.size == 2


@pytest.mark.parametrize("data,model", [(-1, 3), (-1, -1), (3, 3), (0, 1), (-2, 1), (-1, 16)])
def test_mesh_that_does_not_fit(data, model):
    with pytest.raises(InputError, match="mesh"):
        sharding.make_mesh(data, model)


def train(mesh, model, accumulation=1, steps=3):
    """(losses, state) after some steps on a mesh."""
    optimizer = make_optimizer(OPTIM)
    with jax.set_mesh(mesh):
        init = functools.partial(step.init_state, model=model, optimizer=optimizer)
        shardings = sharding.shardings_for(abstract_state(model), mesh)
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        one_step = functools.partial(
            step.train_step, model=model, optimizer=optimizer, schedule=learning_rate(OPTIM),
            accumulation=accumulation, steps=10,
        )  # fmt: skip
        run = jax.jit(one_step, out_shardings=(shardings, None, None), donate_argnums=(0, 1))
        usage, losses = step.empty_usage(model), []
        for seed in range(steps):
            batch = random_batch(context=model.max_seq_len, seed=seed) % model.vocab_size
            state, usage, metrics = run(state, usage, sharding.put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, state) == jax.tree.map(
            lambda place: place.spec, shardings
        )
    return losses, jax.device_get(state), jax.device_get(usage)


MIXED = ModelSpec(256, 16, 32, 2, 2, (NARROW_TREES, LEAVES))


@pytest.mark.parametrize(
    "layers,data,model,accumulation",
    [
        # test_gradients has losses, gradients and visits of one step on this mesh.
        pytest.param(MIXED, 4, 2, 1, id="mixed-4-2", marks=pytest.mark.slow),
        pytest.param(MIXED, 8, 1, 1, id="mixed-8-1", marks=pytest.mark.slow),
        pytest.param(MODEL, 8, 1, 1, id="all-8-1", marks=pytest.mark.slow),
        pytest.param(MODEL, 4, 2, 1, id="all-4-2", marks=pytest.mark.slow),
        pytest.param(MODEL, 1, 8, 1, id="all-1-8", marks=pytest.mark.slow),
        pytest.param(MODEL, 2, 4, 4, id="all-2-4-accumulated", marks=pytest.mark.slow),
    ],
)
def test_loss_is_that_of_one_device(layers, data, model, accumulation):
    alone = train(sharding.make_mesh(1, 1), layers)
    assert_same_training(train(sharding.make_mesh(data, model), layers, accumulation), alone)


def assert_same_training(run, alone):
    """Losses within float32 rounding; nearly every token at the same leaf; thresholds moved alike."""
    (losses, state, usage), (losses_1, state_1, usage_1) = run, alone
    np.testing.assert_allclose(losses, losses_1, rtol=1e-5)
    for counts, counts_1 in zip(jax.tree.leaves(usage), jax.tree.leaves(usage_1), strict=True):
        assert np.abs(counts - counts_1).sum() <= 0.01 * counts.sum()
    for leaf, leaf_1 in zip(jax.tree.leaves(state.routing), jax.tree.leaves(state_1.routing), strict=True):
        np.testing.assert_allclose(leaf, leaf_1, atol=1e-6)


def test_put_batch_splits_rows():
    mesh = sharding.make_mesh(4, 2)
    batch = random_batch()
    placed = sharding.put_batch(batch, mesh)
    assert placed.sharding.spec == P("data") and placed.dtype == jnp.int32
    np.testing.assert_array_equal(placed, batch)
