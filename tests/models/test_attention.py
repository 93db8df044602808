"""Attention by hand, where a score needs more digits than bfloat16 has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tree_ffn.models.attention import causal_attention, flash_on_tpus, self_attention
from tree_ffn.models.transformer import SAVED
from tree_ffn.training.sharding import make_mesh

LOW = lambda *rows: jnp.asarray(rows, jnp.bfloat16)[None]
# Scores 257 / 2 and 256 / 2, equal in bfloat16, weigh as sigmoid(1/2) and sigmoid(-1/2).
Q, K, V = [16, 1, 0, 0], ([16, 1, 0, 0], [16, 0, 0, 0]), ([1, 0, 2, 0], [0, 1, 2, 0])
FIRST = 1 / (1 + np.exp(-0.5))


def check(y_K):
    """Two weights and their sum are rounded to 8 bits."""
    assert y_K.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_K.astype(jnp.float32), [FIRST, 1 - FIRST, 2, 0], rtol=2**-7)


def test_scores_against_a_cache_are_float32():
    k_BHMK, v_BHMK = LOW(*K, [99, 0, 0, 0])[:, None], LOW(*V, [9, 9, 9, 9])[:, None]  # the last is not there
    check(causal_attention(LOW(Q)[:, :, None], k_BHMK, v_BHMK, jnp.int32(1))[0, 0, 0])


def test_scores_of_a_sequence_are_float32():
    y_BCHK = self_attention(*(LOW(*rows)[:, :, None] for rows in ((Q, Q), K, V)))
    check(y_BCHK[0, 1, 0])


@pytest.mark.parametrize(
    "mesh", [(2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 1), (4, 1)))]
)
def test_the_kernel_of_tpus_is_the_definition(mesh, rng):
    """Its outputs and gradients, also where devices have rows and heads of their own; by its interpreter."""
    q, k, v, dy = (jnp.asarray(rng.normal(size=(2, 128, 2, 8)), jnp.float32) for _ in range(4))
    swapped = lambda array: jnp.swapaxes(array, 1, 2)
    plain = lambda q, k, v: causal_attention(q, swapped(k), swapped(v), jnp.int32(0))
    run = lambda attend: jax.jit(lambda *arrays: (attend(*arrays), jax.vjp(attend, *arrays)[1](dy)))(q, k, v)
    with jax.set_mesh(make_mesh(*mesh)), pltpu.force_tpu_interpret_mode():
        found = run(flash_on_tpus)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_the_kernel_of_tpus_saves_no_padding_and_its_output_once():
    """Rows of 128 numbers of the queries, keys, values and outputs, and the two sums of the softmax."""
    attend = jax.checkpoint(lambda *arrays: jnp.square(flash_on_tpus(*arrays)), policy=SAVED["none"])
    saved = lambda *arrays: jax.tree.leaves(jax.vjp(attend, *arrays)[1])
    leaves = jax.eval_shape(saved, *[jax.ShapeDtypeStruct((2, 128, 2, 8), jnp.float32)] * 3)
    assert sorted(leaf.shape for leaf in leaves if leaf.ndim > 1) == [(2, 2, 8, 128)] * 4 + [(2, 2, 128)] * 2
