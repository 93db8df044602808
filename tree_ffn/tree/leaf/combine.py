"""Implementations: what the chosen experts add up to. They see ids, gates, shapes and the activation only.

y = b_out + sum over k of g[k] sum over u of act(<w_in[j,u], x> + b_in[j,u]) w_out[j,u],    j = ids[k]
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_choice
from tree_ffn.tree.activations import activation
from tree_ffn.tree.leaf.spec import LeafSpec
from tree_ffn.tree.products import weighed_units


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
      params: {w_in [X,W,E], b_in [X,W], w_out [X,W,E], b_out [E]}.
      x_TE: tokens.
      ids_TK, gates_TK: of `route`.
      spec: the layer.
      implementation: a name of `IMPLEMENTATIONS`; None: by the number of tokens.
      leak: float32 scalar of a dense start (`LeafSpec.leak_at`): every expert's gate is then leak +
        (1 - leak) g, g = 0 where it is not chosen. `masked` alone computes that.

    Raises:
      InputError: there is no such implementation, or it is another than `masked` and there is a leak.
    """
    if implementation is None:
        implementation = "masked" if leak is not None else _fastest(x_TE.shape[0], spec)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if leak is None:
        y_TE = IMPLEMENTATIONS[implementation](params, x_TE, ids_TK, gates_TK, spec)
    elif implementation == "masked":
        y_TE = masked(params, x_TE, ids_TK, gates_TK, spec, leak)
    else:
        raise InputError(
            f"implementation: {implementation!r} computes no expert that is not chosen, and a dense start "
            "needs all; use 'masked', or name none ('auto' in a config)."
        )
    return y_TE + params["b_out"].astype(x_TE.dtype)[None]


def _fastest(n_tokens, spec: LeafSpec) -> str:
    """`gather` as long as it reads no more rows than there are; X, K, W = 512, 16, 6 and 128, 4, 24, E = 768.

    There it takes .03 of masked's time for a token on a CPU, a half for X / K = 32, and 2 to 8 times for 64.
    """
    few = isinstance(n_tokens, int) and n_tokens * spec.top_k <= spec.n_experts  # an exported batch is none
    return "gather" if few else "masked"


def masked(params, x_TE, ids_TK, gates_TK, spec: LeafSpec, leak=None) -> jax.Array:
    """Every expert of every token, those that are not chosen times 0: two dense products. For training."""
    mine_TKX = ids_TK[..., None] == jnp.arange(spec.n_experts, dtype=ids_TK.dtype)[None, None]
    gate_TX = jnp.where(mine_TKX, gates_TK[..., None], 0.0).sum(axis=1)
    if leak is not None:
        gate_TX = leak + (1 - leak) * gate_TX
    return weighed_units(params, x_TE, activation(spec.activation), gate_TX)


def gather(params, x_TE, ids_TK, gates_TK, spec: LeafSpec) -> jax.Array:
    """The rows of the chosen experts, read for each token by itself."""
    dtype = x_TE.dtype
    w_in, b_in, w_out = (params[name][ids_TK] for name in ("w_in", "b_in", "w_out"))
    z_TKW = jnp.einsum("TE,TKWE->TKW", x_TE, w_in.astype(dtype), preferred_element_type=jnp.float32)
    h_TKW = activation(spec.activation)(z_TKW + b_in.astype(jnp.float32)) * gates_TK[..., None]
    return jnp.einsum("TKW,TKWE->TE", h_TKW.astype(dtype), w_out.astype(dtype))


# A new one is an entry here; it may do as it likes, but for rounding, within what `combine` says.
IMPLEMENTATIONS = {"masked": masked, "gather": gather}
