"""Attention by hand, where a score needs more digits than bfloat16 has."""

import jax.numpy as jnp
import numpy as np

from tree_ffn.models.attention import causal_attention, self_attention

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
