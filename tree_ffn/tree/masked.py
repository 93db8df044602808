"""The implementation for training: all units of every token, those that are not chosen times 0.

Of experts that have units of their own, rows of one expert each; of others see `combine.weighed`.
"""

import functools

import jax
import jax.numpy as jnp

from tree_ffn.tree import chosen
from tree_ffn.tree.activations import activation
from tree_ffn.tree.products import pre_activations


def masked(
    params: dict, x_TE: jax.Array, ids_TK: jax.Array, gates_TK: jax.Array, spec, leak=None
) -> jax.Array:
    """Two dense products: [T, E] of x's dtype, in the precision of every layer (docs/layer.md).

        g[x] = leak + (1 - leak) gate of expert x, if it is chosen, else leak
        s = sum over x of g[x] sum over units w of act(<w_in[x,w], x> + b_in[x,w]) w_out[x,w]

    Args:
      params: w_in, b_in, w_out of the layer, and what `spec.row` reads.
      x_TE: tokens.
      ids_TK: int32, the chosen experts.
      gates_TK: float32, their gates.
      spec: a LeafSpec.
      leak: float32 scalar of a dense start; None: 0.
    """
    row_TK, leak = spec.row(params, ids_TK), jnp.float32(0) if leak is None else leak
    gates_TK = (1 - leak) * gates_TK
    gate_TX = leak + chosen.put(gates_TK, row_TK, spec.kept_experts)
    shape = (spec.kept_experts, spec.expert_width)
    z_TXW = pre_activations(x_TE, params["w_in"].reshape(*shape, -1), params["b_in"].reshape(shape))
    h_TF = _hidden((spec.activation, x_TE.dtype), z_TXW, gate_TX, gates_TK, leak, row_TK)
    return jnp.einsum("tf,fe->te", h_TF, params["w_out"].astype(x_TE.dtype).reshape(h_TF.shape[1], -1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _hidden(how: tuple, z_TXW, gate_TX, gates_TK, leak, row_TK):
    """g act(z): [T, F]. The sums that are the gradients of gates are made of the chosen experts alone.

    Args:
      how: the activation's name, the result's dtype.
      z_TXW: float32.
      gate_TX: of all experts: the leak, and the gates put where they belong. Its derivative is theirs.
      gates_TK: (1 - leak) g of the chosen.
      leak: float32 scalar.
      row_TK: int32, where they stand.
    """
    return _flat(_added(how[0], z_TXW, gate_TX), how[1])


def _added(act: str, z_TXW, gate_TX):
    gate = gate_TX[..., None]
    # A unit of gate 0 adds nothing, though it be no number; of numbers the gate has its gradient.
    felt = lambda value: jnp.where((gate != 0) | jnp.isfinite(value), value, 0.0)
    return felt(activation(act)(felt(z_TXW))) * gate


def _flat(h_TXW, dtype):
    return h_TXW.reshape(h_TXW.shape[0], h_TXW.shape[1] * h_TXW.shape[2]).astype(dtype)


@functools.partial(_hidden.defjvp, symbolic_zeros=True)
def _hidden_jvp(how, primals, tangents):
    (act, dtype), (z_TXW, gate_TX, _, _, row_TK), (dz, _, dgates, dleak, _) = how, primals, tangents
    moving = [None if isinstance(d, jax.custom_derivatives.SymbolicZero) else d for d in (dz, dgates, dleak)]

    # Recomputed in the backward pass: to store what a derivative needs costs more than to compute it again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def moved(z_TXW, gate_TX, row_TK, dz_TXW, dgates_TK, dleak):
        dh_TXW = jnp.zeros_like(z_TXW)
        if dz_TXW is not None:
            dh_TXW += jax.jvp(lambda z: _added(act, z, gate_TX), (z_TXW,), (dz_TXW,))[1]
        if dleak is not None:
            dh_TXW += jax.jvp(lambda leak: _added(act, z_TXW, gate_TX + leak), (0.0,), (dleak,))[1]
        if dgates_TK is not None:
            z_TKW = jnp.take_along_axis(z_TXW, row_TK[..., None], axis=1, mode="promise_in_bounds")
            gate_TK = jnp.take_along_axis(gate_TX, row_TK, axis=1, mode="promise_in_bounds")
            dh_TKW = jax.jvp(lambda gate: _added(act, z_TKW, gate), (gate_TK,), (dgates_TK,))[1]
            none_XW, how = jnp.zeros(z_TXW.shape[1:]), {"mode": "promise_in_bounds", "unique_indices": True}
            dh_TXW += jax.vmap(lambda d_KW, row_K: none_XW.at[row_K].set(d_KW, **how))(dh_TKW, row_TK)
        return _flat(dh_TXW, dtype)

    return _hidden(how, *primals), moved(z_TXW, gate_TX, row_TK, *moving)
