"""Experts by a hash of the token's id: what routing is worth that neither learns nor looks at the context."""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError


def hashed(token_T: jax.Array, salt: jax.Array, n: int) -> jax.Array:
    """A number below n for every id: an integer mixed until all its bits depend on all, mod n.

    Args:
      token_T: integer ids, of a shape that goes with that of `salt`.
      salt: integers; another salt is another hash.
      n: how many numbers there are.

    Source: the finaliser of MurmurHash3 (Appleby, public domain); experts by it: Roller et al. 2021
    (arXiv 2106.04426).
    """
    h = token_T.astype(jnp.uint32) ^ salt.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
    h = h ^ (h >> jnp.uint32(16))
    return (h % jnp.uint32(n)).astype(jnp.int32)


def check_ids(token_T: jax.Array, n_tokens: int) -> None:
    """Raises InputError unless there is one whole number for every token."""
    if token_T.shape != (n_tokens,) or not jnp.issubdtype(token_T.dtype, jnp.integer):
        raise InputError(
            f"token_T: shape {token_T.shape} and dtype {token_T.dtype} are not allowed; use the ids of the "
            f"{n_tokens} tokens, int32 [{n_tokens}]."
        )
