"""The implementation for training: all units of every token, those that are not chosen times 0.

Of experts that have units of their own, rows of one expert each; of others see `combine.weighed`.
"""

import functools

import jax
import jax.numpy as jnp

from tree_ffn.tree import chosen
from tree_ffn.tree.activations import activation
from tree_ffn.tree.meshes import platform, units_are_split
from tree_ffn.tree.products import float32_product


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
    if platform() == "tpu":
        return _along_lanes(params, x_TE, row_TK, gates_TK, leak, spec)
    gate_TX = leak + chosen.put(gates_TK, row_TK, spec.kept_experts)
    w_in, w_out = (params[name].astype(x_TE.dtype).reshape(-1, x_TE.shape[1]) for name in ("w_in", "w_out"))
    how = spec.activation, x_TE.dtype
    h_TF = _hidden(
        how, float32_product(x_TE, w_in), params["b_in"].reshape(-1), gate_TX, gates_TK, leak, row_TK
    )
    return jnp.einsum("tf,fe->te", h_TF, w_out)


def _along_lanes(params: dict, x_TE: jax.Array, row_TK, gates_TK, leak, spec) -> jax.Array:
    """The same on a TPU, whose arrays have 128 lanes: tokens lie along them, [W, X, T].

    Along them W, a few units, would leave most empty, and gates of X experts would be spread over F units.
    """
    dtype, shape = x_TE.dtype, (spec.expert_width, spec.kept_experts)
    of_units = lambda name: params[name].reshape(*shape[::-1], -1).swapaxes(0, 1)
    w_in, b_WX1, w_out = of_units("w_in").astype(dtype), of_units("b_in"), of_units("w_out").astype(dtype)

    # Models compute this again in the backward pass by layers (`transformer.SAVED`): a checkpoint in another
    # stores its inputs twice.
    product_WXT, gate_WXT = float32_product(w_in, x_TE), leak + _gates(gates_TK, row_TK, shape)
    z_WXT = jnp.where(gate_WXT == 0, 0.0, _biased(product_WXT, b_WX1, dtype))
    h_WXT = (activation(spec.activation)(z_WXT) * gate_WXT).astype(dtype)
    return jnp.einsum("wxt,wxe->te", h_WXT, w_out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _gates(gates_TK, row_TK, shape: tuple[int, int]):
    """Gates where they belong, 0 elsewhere: [W, X, T], of every unit for itself.

    Args:
      gates_TK: of the chosen.
      row_TK: int32, where they stand.
      shape: W, X.
    """
    row_WX1 = jax.lax.broadcasted_iota(row_TK.dtype, (*shape, 1), 1)
    rows_and_gates = zip(row_TK.T[:, None, None], gates_TK.T[:, None, None])
    parts = [jnp.where(row_11T == row_WX1, gate_11T, 0) for row_11T, gate_11T in rows_and_gates]
    return functools.reduce(jnp.add, parts)


@_gates.defjvp
def _gates_jvp(shape, primals, tangents):
    d_XT = chosen.put(tangents[0], primals[1], shape[1]).T
    return _gates(*primals, shape), jnp.stack([d_XT] * shape[0])  # so gradients add up units, then read


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _hidden(how: tuple, product_TF, b_F, gate_TX, gates_TK, leak, row_TK):
    """g act(z): [T, F]. The sums that are the gradients of gates are made of the chosen experts alone.

    Args:
      how: the activation's name, the result's dtype.
      product_TF: float32, z without biases.
      b_F: biases.
      gate_TX: of all experts: the leak, and the gates put where they belong. Its derivative is theirs.
      gates_TK: (1 - leak) g of the chosen.
      leak: float32 scalar.
      row_TK: int32, where they stand.
    """
    return _flat(_added(how[0], _z(product_TF, b_F, gate_TX, how[1]), gate_TX), how[1])


def _z(product_TF, b_F, gate_TX, dtype):
    return _biased(product_TF, b_F[None], dtype).reshape(*gate_TX.shape, b_F.size // gate_TX.shape[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _biased(product, b, dtype):
    """A product and its bias, float32. Both gradients are made of one array, rounded to `dtype`.

    So the product's, which is rounded anyway, need not be written twice.

    Args:
      product: float32.
      b: of any floating dtype, 1 along tokens.
      dtype: of the product's operands.
    """
    return product + b.astype(jnp.float32)


@_biased.defjvp
def _biased_jvp(dtype, primals, tangents):
    d = tangents[0] + tangents[1].astype(jnp.float32)
    return _biased(*primals, dtype), d.astype(dtype).astype(jnp.float32)


def _added(act: str, z_TXW, gate_TX):
    gate = gate_TX[..., None]
    # A unit of gate 0 adds nothing, though it be no number; of numbers the gate has its gradient.
    felt = lambda value: jnp.where((gate != 0) | jnp.isfinite(value), value, 0.0)
    return felt(activation(act)(felt(z_TXW))) * gate


def _flat(h_TXW, dtype):
    return h_TXW.reshape(h_TXW.shape[0], h_TXW.shape[1] * h_TXW.shape[2]).astype(dtype)


@functools.partial(_hidden.defjvp, symbolic_zeros=True)
def _hidden_jvp(how, primals, tangents):
    (act, dtype), (product_TF, b_F, gate_TX, _, _, row_TK) = how, primals
    is_still = lambda d: isinstance(d, jax.custom_derivatives.SymbolicZero)
    d_product, d_b, _, *d_gates, _ = (None if is_still(d) else d for d in tangents)

    # Recomputed in the backward pass: to store what a derivative needs costs more than to compute it again.
    @jax.checkpoint
    def moved(product_TF, b_F, gate_TX, row_TK, d_product_TF, d_b_F, d_gates_TK, d_leak):
        z_TXW = _z(product_TF, b_F, gate_TX, dtype)
        dh_TXW = jnp.zeros_like(z_TXW)
        if d_product_TF is not None or d_b_F is not None:
            d_product_TF = jnp.zeros_like(product_TF) if d_product_TF is None else d_product_TF
            d_b_F = jnp.zeros_like(b_F) if d_b_F is None else d_b_F
            of_all = lambda product_TF, b_F: _added(act, _z(product_TF, b_F, gate_TX, dtype), gate_TX)
            dh_TXW += jax.jvp(of_all, (product_TF, b_F), (d_product_TF, d_b_F))[1]
        if d_leak is not None:
            of_leak = lambda more: _added(act, z_TXW, gate_TX + more)
            dh_TXW += jax.jvp(of_leak, (jnp.zeros_like(d_leak),), (d_leak,))[1]
        if d_gates_TK is not None:
            dh_TXW += _of_chosen(act, z_TXW, gate_TX, row_TK, d_gates_TK)
        return _flat(dh_TXW, dtype)

    return _hidden(how, *primals), moved(product_TF, b_F, gate_TX, row_TK, d_product, d_b, *d_gates)


def _of_chosen(act: str, z_TXW, gate_TX, row_TK, d_gates_TK):
    """How g act(z) moves with the gates of the chosen: the transpose reads their rows and no others.

    Of divided experts, which would be sent, it sums over all.
    """
    if units_are_split():
        d_TX = chosen.put(d_gates_TK, row_TK, gate_TX.shape[1])
        return jax.jvp(lambda gate_TX: _added(act, z_TXW, gate_TX), (gate_TX,), (d_TX,))[1]
    z_TKW = jnp.take_along_axis(z_TXW, row_TK[..., None], axis=1, mode="promise_in_bounds")
    gate_TK = jnp.take_along_axis(gate_TX, row_TK, axis=1, mode="promise_in_bounds")
    d_TKW = jax.jvp(lambda gate_TK: _added(act, z_TKW, gate_TK), (gate_TK,), (d_gates_TK,))[1]
    none_XW = jnp.zeros(z_TXW.shape[1:], z_TXW.dtype)
    how = {"mode": "promise_in_bounds", "unique_indices": True}
    return jax.vmap(lambda d_KW, row_K: none_XW.at[row_K].set(d_KW, **how))(d_TKW, row_TK)
