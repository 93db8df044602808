"""Implementations: what the chosen experts add up to. They see ids, gates, shapes and the activation only.

y = b_out + sum over k of g[k] sum over u of act(<w_in[j,u], x> + b_in[j,u]) w_out[j,u],    j = ids[k]
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.activations import activation
from tree_ffn.tree.leaf.spec import LeafSpec

IMPLEMENTATIONS = ("masked", "gather")
# Up to so many tokens each reads its own experts' rows; more of them meet most experts anyway.
GATHER_TOKENS = 16


def combine(
    params: dict,
    x_TE: jax.Array,
    ids_TK: jax.Array,
    gates_TK: jax.Array,
    spec: LeafSpec,
    implementation: str | None = None,
    leak: jax.Array | None = None,
) -> jax.Array:
    """The sum of the chosen experts, of x's shape and dtype.

    Args:
      params: {w_in [X,W,E], b_in [X,W], w_out [X,W,E], b_out [E]}, cast to x's dtype.
      x_TE: tokens.
      ids_TK, gates_TK: of `route`.
      spec: the layer.
      implementation: one of `IMPLEMENTATIONS`; None: by the number of tokens.
      leak: float32 scalar of a dense start (`LeafSpec.leak_at`): every expert's gate is then leak +
        (1 - leak) g, g = 0 where it is not chosen. It needs `masked`.
    """
    few = isinstance(x_TE.shape[0], int) and x_TE.shape[0] <= GATHER_TOKENS
    if leak is None and (implementation == "gather" or (implementation is None and few)):
        y_TE = gather(params, x_TE, ids_TK, gates_TK, spec)
    else:
        y_TE = masked(params, x_TE, ids_TK, gates_TK, spec, leak)
    return y_TE + params["b_out"].astype(x_TE.dtype)[None]


def masked(params, x_TE, ids_TK, gates_TK, spec: LeafSpec, leak=None) -> jax.Array:
    """Every expert of every token, those that are not chosen times 0: two dense products. For training."""
    dtype = x_TE.dtype
    mine_TKX = ids_TK[..., None] == jnp.arange(spec.n_experts, dtype=ids_TK.dtype)[None, None]
    gate_TX = jnp.where(mine_TKX, gates_TK[..., None], 0.0).sum(axis=1)
    if leak is not None:
        gate_TX = leak + (1 - leak) * gate_TX

    # Recomputed in the backward pass: to store what its derivative needs costs more than to compute it again.
    @jax.checkpoint
    def hidden(z_TXW, gate_TX):
        units = activation(spec.activation)(z_TXW)
        return units * gate_TX.astype(dtype)[..., None]

    z_TXW = jnp.einsum("TE,XWE->TXW", x_TE, params["w_in"].astype(dtype))
    h_TXW = hidden(z_TXW + params["b_in"].astype(dtype)[None], gate_TX)
    return jnp.einsum("TXW,XWE->TE", h_TXW, params["w_out"].astype(dtype))


def gather(params, x_TE, ids_TK, gates_TK, spec: LeafSpec) -> jax.Array:
    """The rows of the chosen experts, read for each token by itself."""
    dtype = x_TE.dtype
    w_in, b_in, w_out = (params[name][ids_TK].astype(dtype) for name in ("w_in", "b_in", "w_out"))
    h_TKW = activation(spec.activation)(jnp.einsum("TE,TKWE->TKW", x_TE, w_in) + b_in)
    return jnp.einsum("TKW,TKWE->TE", h_TKW * gates_TK.astype(dtype)[..., None], w_out)
