"""Routers that stop: which rows they are; from their step on these keep every bit, and nothing else does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import KINDS
from tests.training.tiny import random_batch, tiny_config, tiny_model
from tree_ffn.errors import InputError
from tree_ffn.models.spec import ModelSpec
from tree_ffn.training.finetune import FinetuneSpec
from tree_ffn.training.optimizer import OptimSpec
from tree_ffn.training.programs import compile_programs
from tree_ffn.training.routers import hold_routers, router_rows
from tree_ffn.training.setup import check_trainable, plan_run
from tree_ffn.training.sharding import put_batch
from tree_ffn.training.teacher import compile_finetuning
from tree_ffn.tree import PrunedSpec, TreeShape, TreeSpec

STEPS, STOP = 6, 3
WIDTHS = TreeShape(n_trees=2, depth=2, node_width=(2, 3, 1))  # units of a level: 2, 2 x 3, 4 x 1


@pytest.mark.parametrize(
    "ffn,first_units,n_units",
    [
        (TreeSpec(WIDTHS), [0, 2, 5], 12),
        (TreeSpec(WIDTHS, router="silent", routing="continuous"), [0, 2, 5], 12),
        (TreeSpec(WIDTHS, routing="straight_through", hash_levels=1), [2, 5], 12),
        # Units of both trees: 2 roots of 2, 3 nodes of 3, 4 leaves; roots first.
        (PrunedSpec(WIDTHS, nodes=(2, 3, 4)), [0, 2, 4, 7, 10], 17),
    ],
)
def test_first_units_of_deciding_nodes_are_routers(ffn, first_units, n_units):
    rows = router_rows(ffn)
    assert rows.keys() == {"w_in", "b_in"}
    assert rows["b_in"].shape == (n_units,) and rows["w_in"].shape == (n_units, 1)
    np.testing.assert_array_equal(np.flatnonzero(rows["b_in"]), first_units)
    np.testing.assert_array_equal(rows["w_in"][:, 0], rows["b_in"])


def test_layers_without_learned_decisions_have_no_router():
    for kind in ("dense", "narrow", "hash", "random_tree", "hash_tree", "pruned_random_tree", "leaf_hash"):
        assert router_rows(KINDS[kind]) == {}
    assert router_rows(TreeSpec(TreeShape(n_trees=2, depth=0))) == {}
    assert router_rows(KINDS["moe"]).keys() == router_rows(KINDS["leaf_softmax"]).keys() == {"w_router"}
    assert router_rows(KINDS["leaf"]).keys() == {"w_router", "b_router"}


def states(config, compile=compile_programs):
    """The state before every step and after the last, on the host."""
    plan = plan_run(config)
    programs = compile(plan)
    copied = lambda state: jax.tree.map(np.array, jax.device_get(state))  # a step writes over its arguments
    with jax.set_mesh(plan.mesh):
        state, usage = programs.init(jax.random.key(plan.seed)), programs.scorer.empty_usage()
        found = [copied(state)]
        for seed in range(plan.train.steps):
            batch = random_batch(plan.train.batch_size, plan.model.context, seed)
            state, usage, _ = programs.train_step(state, usage, put_batch(batch, plan.mesh))
            found.append(copied(state))
    return plan.model, found


def split(model: ModelSpec, state) -> tuple[dict, dict]:
    """What of a state is of routers or balancing, and the other rows of the same arrays and all else."""
    stands, learns = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        run, name = path[0].key, path[-1].key
        ffn = model.runs[int(run.removeprefix("run_"))][0] if run.startswith("run_") else None
        rows = router_rows(ffn).get(name) if len(path) == 3 and path[1].key == "ffn" else None
        key = jax.tree_util.keystr(path)
        if rows is None:
            learns[key] = leaf
            continue
        rows = np.broadcast_to(rows, leaf.shape)
        stands[key] = leaf[rows]
        if not rows.all():
            learns[key] = leaf[~rows]
    stands |= {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state.routing)}
    return stands, learns


def bits(values: dict) -> dict:
    return {name: value.tobytes() for name, value in values.items()}


TREES = {"ffn__routing": "straight_through", "ffn__balance": "sign", "ffn__leak": 1.0, "ffn__leak_share": 0.5}
MIXED = {**TREES, "model__n_layers": 5, "model__layers": "tree*2,moe,random_tree,leaf"}
MIXED |= {"ffn__shared_width": 3}
# eps: keys' biases have no gradient but rounding, and Adam would make a whole step of it.
SHARDED = {"mesh__data": 2, "mesh__model": 2, "optim__eps": 1e-5}
FINETUNING = lambda plan: compile_finetuning(plan, FinetuneSpec())


@pytest.mark.parametrize(
    "changes,compile",
    [
        ({**TREES, "train__accumulation": 2}, compile_programs),
        pytest.param({**MIXED, **SHARDED}, compile_programs, marks=pytest.mark.slow),
        ({"ffn__routing": "continuous", "ffn__router": "silent", "ffn__hash_levels": 1}, compile_programs),
        (TREES, FINETUNING),
    ],
    ids=["microbatches", "mixed_and_sharded", "silent_and_hashed", "finetuning"],
)
def test_routers_keep_every_bit_from_their_step_on(texts, changes, compile):
    changes = {"steps": STEPS, "optim__weight_decay": 0.5, **changes}
    model, plain = states(tiny_config(texts, **changes), compile)
    _, found = states(tiny_config(texts, **changes, optim__routers_until=STOP / STEPS), compile)
    for before, after in zip(plain[: STOP + 1], found):
        if "mesh__data" in changes:  # devices add in the order that a program's compiler finds
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, atol=1e-6), before.params, after.params
            )
        else:  # moments too
            jax.tree.map(np.testing.assert_array_equal, before, after)
    kept, _ = split(model, found[STOP])
    moved, _ = split(model, plain[-1])
    assert any(value != bits(moved)[name] for name, value in bits(kept).items())  # as they would have been
    for before, after in zip(found[STOP:], found[STOP + 1 :]):
        (stands, learns), (still, learned) = split(model, before), split(model, after)
        assert bits(stands) == bits(still)
        for name in learns:
            assert (learns[name] != learned[name]).any(), name
        for name in [name for name in learns if name.endswith("['w_in']")]:  # decay alone moves each row
            assert (learns[name] != learned[name]).any(axis=-1).all(), name


def test_what_is_held_is_minus_zero():
    """x + -0 is x to the bit, for x = -0 too."""
    model = tiny_model("tree", model__n_layers=1)
    (ffn, _), shape = model.runs[0], model.ffns[0].shape
    layer = {
        "w_in": jnp.ones((1, shape.n_trees, shape.tree_units, 4)),
        "b_in": jnp.ones((1, shape.n_trees, shape.tree_units)),
    }
    updates = {"run_0": {"ffn": layer}}
    jax.tree.map(np.testing.assert_array_equal, hold_routers(updates, model, jnp.bool_(False)), updates)
    held = hold_routers(updates, model, jnp.bool_(True))["run_0"]["ffn"]
    for name, rows in router_rows(ffn).items():
        rows = np.broadcast_to(rows, layer[name].shape)
        np.testing.assert_array_equal(held[name], np.where(rows, 0.0, 1.0))
        np.testing.assert_array_equal(np.signbit(held[name]), rows)


def test_there_has_to_be_a_router_that_learns():
    optim = OptimSpec(steps=10, lr=1e-3, routers_until=0.5)
    for kind in ("dense", "narrow", "hash", "random_tree", "hash_tree"):
        check_trainable(tiny_model(kind), OptimSpec(steps=10, lr=1e-3))
        with pytest.raises(InputError, match=r"optim.routers_until: 0.5 cannot be used with ffn.kind"):
            check_trainable(tiny_model(kind), optim)
    for layers in ("tree,dense", "moe,hash", "hash_tree,tree"):
        check_trainable(tiny_model(model__layers=layers), optim)


def test_a_config_is_refused_before_any_work(texts):
    with pytest.raises(InputError, match="optim.routers_until: 0.5 cannot be used"):
        plan_run(tiny_config(texts, "hash_tree", optim__routers_until=0.5))
    with pytest.raises(InputError, match="optim.routers_until: 0.0 is not allowed"):
        plan_run(tiny_config(texts, optim__routers_until=0.0))


def test_the_share_is_of_the_run():
    assert OptimSpec(steps=10, lr=1.0).router_steps is None
    assert [OptimSpec(steps=10, lr=1.0, routers_until=s).router_steps for s in (0.01, 0.7, 0.99)] == [
        0,
        7,
        10,
    ]
