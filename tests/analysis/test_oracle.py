"""analysis/oracle.py: leaves moved to where the loss is lower."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.kinds import random_variables
from tree_ffn.analysis import oracle
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec, ModelSpec, Transformer
from tree_ffn.training.losses import token_losses
from tree_ffn.tree import TreeShape, TreeSpec


def model_of(*ffns, width=8, context=6):
    spec = ModelSpec(
        vocab_size=11, max_seq_len=context, width=width, n_layers=len(ffns), n_heads=2, ffns=ffns
    )
    return spec, random_variables(spec)


def rows_of(rng, n_rows, context):
    return jnp.asarray(rng.integers(0, 11, size=(n_rows, context + 1)))


@functools.partial(jax.jit, static_argnames="spec")
def mean_loss(variables, rows, spec):
    logits, _ = Transformer(spec).apply(variables, rows[:, :-1])
    return token_losses(logits, rows[:, 1:]).mean()


def own_loss(spec, variables, rows):
    return float(mean_loss(variables, rows, spec))


TREES = TreeSpec(TreeShape(n_trees=2, depth=2, node_width=2), routing="straight_through")
FROZEN = TreeSpec(TreeShape(n_trees=3, depth=2, node_width=(1, 2, 3)), router="frozen")


@pytest.mark.parametrize(
    "ffn, layer",
    [(TREES, 0), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((TREES, 1), (FROZEN, 0)))],
)
def test_the_loss_begins_as_the_models_own_and_never_rises(rng, ffn, layer):
    spec, variables = model_of(ffn, ffn)
    rows = rows_of(rng, 4, 6)
    found = oracle.better_leaves(spec, variables, rows, layer, rounds=6)
    assert found.losses[0] == pytest.approx(own_loss(spec, variables, rows), rel=1e-5)
    assert len(found.losses) == 7
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(found.losses))
    assert found.losses[-1] < found.losses[0] - 1e-3 and 0 < found.moved <= 1


@pytest.mark.slow
def test_one_token_ends_where_trying_all_leaves_ends(rng):
    """One tree, one position: moves are what a search over its four leaves finds, or none."""
    tree = TreeSpec(TreeShape(n_trees=1, depth=2, node_width=1))
    spec, variables = model_of(tree, context=1)
    for seed in range(4):
        rows = rows_of(np.random.default_rng(seed), 1, 1)
        losses = []
        for thresholds in ([9, 9, 9], [9, -9, 9], [-9, 9, 9], [-9, 9, -9]):
            forced = jnp.asarray([[*thresholds, 0, 0, 0, 0]], jnp.float32)[None]
            routing = {"run_0": {"ffn": {**variables["routing"]["run_0"]["ffn"], "threshold": forced * 1e6}}}
            losses.append(own_loss(spec, {"params": variables["params"], "routing": routing}, rows))
        found = oracle.better_leaves(spec, variables, rows, 0, rounds=4)
        assert found.losses[0] == pytest.approx(own_loss(spec, variables, rows), rel=1e-5)
        # To first order: no worse than its own leaf, and no better than the best there is.
        assert min(losses) - 1e-5 <= found.losses[-1] <= found.losses[0] + 1e-6
        if found.moved:
            assert any(found.losses[-1] == pytest.approx(loss, rel=1e-4) for loss in losses)


@pytest.mark.parametrize(
    ("ffn", "layer", "rounds", "said"),
    [
        (TREES, 2, 1, "layer: 2 is not allowed; the model has layers 0 to 0"),
        (TREES, 0, 0, "rounds"),
        (DenseSpec(8), 0, 1, "layer: 0 is not allowed; leaves are moved"),
        (TreeSpec(TreeShape(1, 2), act_site="sum"), 0, 1, "activation at the nodes"),
    ],
)
def test_bad_input(rng, ffn, layer, rounds, said):
    spec, variables = model_of(ffn)
    with pytest.raises(InputError, match=said):
        oracle.better_leaves(spec, variables, rows_of(rng, 1, 6), layer, rounds)
