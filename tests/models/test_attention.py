"""Attention by hand, where a score needs more digits than bfloat16 has."""

import jax.numpy as jnp
import numpy as np

from tree_ffn.models.attention import causal_attention


def test_scores_against_a_cache_are_float32():
    """Scores 257 / 2 and 256 / 2, equal in bfloat16, weigh as sigmoid(1/2) and sigmoid(-1/2)."""
    low = lambda *rows: jnp.asarray(rows, jnp.bfloat16)[None]
    q_BCHK = low([16, 1, 0, 0])[:, :, None]
    k_BHMK = low([16, 1, 0, 0], [16, 0, 0, 0], [99, 0, 0, 0])[:, None]  # the last is not written yet
    v_BHMK = low([1, 0, 2, 0], [0, 1, 2, 0], [9, 9, 9, 9])[:, None]
    y_BCHK = causal_attention(q_BCHK, k_BHMK, v_BHMK, jnp.int32(1))
    first = 1 / (1 + np.exp(-0.5))
    assert y_BCHK.dtype == jnp.bfloat16
    # Two weights and their sum are rounded to 8 bits.
    np.testing.assert_allclose(y_BCHK[0, 0, 0].astype(jnp.float32), [first, 1 - first, 2, 0], rtol=2**-7)
