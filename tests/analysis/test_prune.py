"""Which leaves a threshold keeps, and what becomes of a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tests.tree.cases import first_weights
from tree_ffn.analysis.prune import (
    Calibration,
    can_be_static,
    kept_experts,
    kept_leaves,
    prune_model,
    static_layer,
    tokens_needed,
)
from tree_ffn.errors import InputError
from tree_ffn.inference.batching import generate
from tree_ffn.inference.sampling import Sampling
from tree_ffn.models import DenseSpec, Transformer, export, total_units, unrolled
from tree_ffn.models.dense import dense_ffn
from tree_ffn.training.step import count_usage, empty_usage
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeShape, TreeSpec, prune, tree_ffn
from tree_ffn.tree.path import init_params

TREES = TreeSpec(TreeShape(n_trees=2, depth=3, node_width=2))
SUMMED = dataclasses.replace(TREES, act_site="sum")
FROZEN = dataclasses.replace(TREES, router="frozen")
LEAVES = LeafSpec(n_experts=32, expert_width=2, top_k=2, balance_rate=1e-2)
LAYERS = (TREES, TREES, KINDS["dense"], SUMMED, KINDS["leaf_hash"], FROZEN, LEAVES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 16)), jnp.int32)


def test_what_a_threshold_keeps():
    """visits <= share of the tokens goes, but never both children; the left stays at a tie."""
    counts = np.array([[50, 10, 0, 0, 2, 3, 35, 0]])
    keep = lambda threshold: "".join(map(str, kept_leaves(counts, threshold, 100)[0].astype(int)))
    assert keep(0) == "11001110"
    assert keep(0.02) == "11000110"  # exactly the share goes too
    assert keep(0.05) == "11000010"
    assert keep(0.1) == "10000010"
    assert keep(0.4) == "10000000" == keep(1)
    counts = np.array([[0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(kept_leaves(counts, 0, 1), [[True, False, False, False]] * 2)


def test_leaves_only_ever_become_fewer(rng):
    counts = rng.integers(0, 40, (3, 32)) * (rng.random((3, 32)) < 0.5)
    tokens, before = int(counts[0].sum()), None
    for threshold in (0, 1e-3, 1e-2, 0.1, 0.5, 1):
        kept = kept_leaves(counts, threshold, tokens)
        assert kept.any(axis=1).all()
        assert before is None or not (kept & ~before).any()
        before = kept
    assert (kept.sum(axis=1) == 1).all()


def test_what_a_threshold_keeps_of_experts(rng):
    """visits <= share of the tokens goes, but the K that are chosen most stay; the first ones at a tie."""
    counts = np.array([50, 10, 0, 0, 2, 3, 35, 0])
    keep = lambda threshold, **given: kept_experts(counts, threshold, 100, 2, **given).astype(int).tolist()
    assert keep(0) == [1, 1, 0, 0, 1, 1, 1, 0]
    assert keep(0.02) == [1, 1, 0, 0, 0, 1, 1, 0]  # exactly the share goes too
    assert keep(0.4) == keep(1) == [1, 0, 0, 0, 0, 0, 1, 0]
    assert keep(0, present_X=np.arange(8) % 4 > 1) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert kept_experts(np.zeros(4, int), 0, 1, 3).tolist() == [True] * 3 + [False]


def test_what_is_gone_is_not_kept():
    counts, present = np.array([[9, 0, 0, 0]]), np.array([[False, False, True, True]])
    np.testing.assert_array_equal(kept_leaves(counts, 0, 9, present), [[False, False, True, False]])


def calibrated(model, variables):
    """Visits of TOKENS."""
    _, infos = forward(model)(variables, TOKENS)
    usage = jax.device_get(count_usage(empty_usage(model), infos))
    return Calibration(usage, TOKENS.size)


@pytest.fixture(scope="module")
def trained():
    """A model whose trees differ, with other kinds between them; executed by gather."""
    model = model_spec(*LAYERS, implementation="gather")
    return model, random_variables(model)


@pytest.fixture(scope="module")
def trained_leaves():
    model = model_spec(*(dataclasses.replace(LEAVES, n_experts=16, balance_rate=0.0),) * 2)
    return model, random_variables(model)


@pytest.mark.parametrize("ffns", [(TREES, LEAVES), pytest.param(LAYERS, marks=pytest.mark.slow)], ids=len)
def test_threshold_0_loses_no_bit_on_the_calibration_tokens(ffns, jit_as_users):
    alone = model_spec(*ffns, implementation="gather")
    alone, variables_alone = unrolled(alone, random_variables(alone))
    calibration = calibrated(alone, variables_alone)
    model, variables = prune_model(alone, variables_alone, calibration, 0)
    assert sum(map(total_units, model.ffns)) < sum(map(total_units, alone.ffns))
    want, infos = jit_as_users(Transformer(alone).apply)(variables_alone, TOKENS)
    got, new_infos = jit_as_users(Transformer(model).apply)(variables, TOKENS)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(want).view(np.uint32))
    for info, new in zip(infos, new_infos):
        np.testing.assert_array_equal(info.leaf_TP, new.leaf_TP)  # leaves keep their numbers


@pytest.mark.slow
def test_runs_are_made_anew(trained):
    """Layers of one run part where they lose different leaves, and layers that lose nothing stay."""
    model, variables = trained
    calibration = calibrated(model, variables)
    pruned, new = prune_model(model, variables, calibration, 0)
    assert [length for _, length in model.runs] == [2, 1, 1, 1, 1, 1]
    for ffn, old in zip(pruned.ffns[:-1], model.ffns):
        assert isinstance(ffn, PrunedSpec) == isinstance(old, TreeSpec)
    assert isinstance(pruned.ffns[-1], LeafSpec) and 2 <= pruned.ffns[-1].n_kept < 32
    y, infos = forward(pruned)(new, TOKENS)
    want, _ = forward(model)(variables, TOKENS)
    np.testing.assert_allclose(y, want, atol=1e-4)
    full = Calibration(
        tuple(None if counts is None else counts + 1 for counts in calibration.usage), calibration.tokens
    )
    same, _ = prune_model(model, variables, full, 0)
    assert same == model
    generate(pruned, new, np.asarray(TOKENS[:1, :4]), n_tokens=2)


@pytest.mark.parametrize("spec, static", [("hard", True), ("straight_through", True), ("summed", False)])
def test_one_path_is_a_static_dense_layer(spec, static, rng):
    spec = (KINDS | {"summed": dataclasses.replace(KINDS["hard"], act_site="sum")})[spec]
    params = jax.tree.map(np.array, first_weights(init_params, spec, 8))
    params["b_in"] = rng.normal(size=params["b_in"].shape).astype(np.float32)
    keep = np.array([[False, True, False, False], [False, False, True, False]])
    pruned_spec, pruned = prune(params, spec, keep)
    assert can_be_static(pruned_spec) == static and not can_be_static(spec)
    x = jnp.asarray(rng.normal(size=(7, 8)), jnp.float32)
    y, _ = jax.jit(tree_ffn, static_argnums=(2, 3))(pruned, x, pruned_spec, "gather")
    dense_spec, dense = static_layer(pruned, pruned_spec)
    assert dense_spec == DenseSpec(spec.shape.active_units)
    dense_y, _ = jax.jit(dense_ffn, static_argnums=2)(dense, x, dense_spec)
    assert (np.abs(dense_y - y).max() < 1e-5) == static  # the activation of a sum comes after it


@pytest.mark.slow
def test_static_models(trained):
    """Trees of one path become dense, and those of an activation after the sum stay trees."""
    model, variables = trained
    calibration = calibrated(model, variables)
    pruned, new = prune_model(model, variables, calibration, 1)
    static, static_variables = prune_model(model, variables, calibration, 1, static=True)
    assert [type(ffn) for ffn in static.ffns] == [
        DenseSpec, DenseSpec, DenseSpec, PrunedSpec, LeafSpec, DenseSpec, LeafSpec,
    ]  # fmt: skip
    assert sum(map(total_units, static.ffns)) == sum(map(total_units, pruned.ffns))
    run = lambda model, variables: forward(model)(variables, TOKENS)[0]
    np.testing.assert_allclose(run(pruned, new), run(static, static_variables), atol=1e-4)


@pytest.mark.slow
def test_decoding_of_a_pruned_leaf_model_is_its_forward_pass(trained_leaves):
    """Greedily, token by token with a cache, what one pass over the whole text finds likeliest, masked."""
    model, variables = trained_leaves
    pruned, new = prune_model(model, variables, calibrated(model, variables), 0.05)
    assert all(2 <= ffn.n_kept < 16 for ffn in pruned.ffns)
    prompt = TOKENS[0, :6].tolist()
    text = np.array([prompt + generate(pruned, new, [prompt], 8, Sampling(greedy=True))[0]])
    whole = dataclasses.replace(pruned, implementation="masked")
    logits, infos = forward(whole)(new, text[:, :-1])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1)[:, 5:], text[:, 6:])
    rows = new["routing"]["run_0"]["ffn"]["kept_row"]
    chosen = np.asarray(infos[0].leaf_TP)
    assert all((row[ids] >= 0).all() for row, ids in zip(rows, chosen))


def test_a_pruned_leaf_model_is_pruned_again_and_exported(trained_leaves, tmp_path):
    model, variables = trained_leaves
    calibration = calibrated(model, variables)
    once, new = prune_model(model, variables, calibration, 0)
    twice, newer = prune_model(once, new, calibrated(once, new), 0.1)
    assert twice.ffns[0].n_kept < once.ffns[0].n_kept
    wanted, arrays = prune_model(model, variables, calibration, 0.1)
    assert wanted == twice
    jax.tree.map(np.testing.assert_array_equal, newer, arrays)
    export.save(str(tmp_path / "out"), twice, newer, "bytes", {})
    found, read, _ = export.load(str(tmp_path / "out"))
    assert found == twice
    jax.tree.map(np.testing.assert_array_equal, read, newer)


def test_what_cannot_be_pruned(trained):
    model, variables = trained
    assert tokens_needed(model) == 32000
    with pytest.raises(InputError, match=r"threshold: 1.5 is not allowed; use a share .* from 0 to 1"):
        prune_model(model, variables, calibrated(model, variables), 1.5)
    with pytest.raises(InputError, match="can be pruned, its ffn.kind is 'dense', 'leaf'; only layers"):
        tokens_needed(model_spec(KINDS["dense"], KINDS["leaf_hash"]))
