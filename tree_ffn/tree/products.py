"""Matrix products whose results need more digits than their operands have."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tree_ffn.tree.meshes import platform

ALIGNED = 8  # numbers of 2 bytes that a GPU reads at once
# Names for checkpoint policies, which do not look into a custom_jvp: of products, and of chosen experts.
PRODUCT, CHOICE = "product", "choice"


def float32_product(x_TE: jax.Array, w_FE: jax.Array) -> jax.Array:
    """x w^T in float32 from operands of any dtype; its derivatives are products in that dtype.

    Differentiating a bfloat16 product with a float32 result would run the two
    backward products in float32; the operands' own dtype is enough.

    Args:
      x_TE: [..., E].
      w_FE: [F, E], of x's dtype.

    Returns:
      float32 [..., F].

    Example:
      >>> float32_product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)).dtype.name
      'float32'
    """
    return checkpoint_name(_product(x_TE, w_FE), PRODUCT)


@jax.custom_jvp
def _product(x_TE, w_FE):
    return jnp.einsum("...e,fe->...f", x_TE, w_FE, preferred_element_type=jnp.float32)


@_product.defjvp
def _tangent(primals, tangents):
    (x_TE, w_FE), (dx_TE, dw_FE) = primals, tangents
    product = lambda x_TE, w_FE: jnp.einsum("...e,fe->...f", x_TE, w_FE)
    # Rounded to the operands' dtype: its transpose rounds the gradient before the two backward products.
    d_TF = (product(dx_TE, w_FE) + product(x_TE, dw_FE)).astype(jnp.float32)
    return _product(x_TE, w_FE), d_TF


def separate_product(x_TE: jax.Array, w_FE: jax.Array) -> jax.Array:
    """`float32_product` of any number of rows beside a larger product of the same tokens.

    GPUs multiply whole blocks, and read rows of a length that is no multiple of 16 bytes number by number:
    there zeros fill the rows up. XLA would make one product of the two, of which neither's rows are aligned,
    and copy weights, results and gradients to join and part them: a barrier keeps them apart. (For TPUs it
    fails to compile the gradient of such rows over several chips, libtpu 0.0.42.)

    Args:
      x_TE: tokens.
      w_FE: of any floating dtype; products are in x's.

    Returns:
      float32 [T, F]; on GPUs [T, S], with zeros from F on.
    """
    w_FE = w_FE.astype(x_TE.dtype)
    if platform() != "gpu":
        return float32_product(x_TE, w_FE)
    w_SE = jnp.pad(w_FE, ((0, -w_FE.shape[0] % ALIGNED), (0, 0)))
    return float32_product(_apart(x_TE), w_SE)


@jax.custom_jvp
def _apart(x_TE):
    return jax.lax.optimization_barrier(x_TE)


@_apart.defjvp
def _apart_jvp(primals, tangents):
    return _apart(*primals), tangents[0]  # gradients of the same tokens are added up by a product


def pre_activations(x_TE: jax.Array, w_PUE: jax.Array, b_PU: jax.Array) -> jax.Array:
    """z = x w + b of units in P groups: float32 [T, P, U], by one `float32_product`.

    Args:
      x_TE: tokens.
      w_PUE: of the units, any floating dtype.
      b_PU: the same.
    """
    w_FE = w_PUE.astype(x_TE.dtype).reshape(b_PU.size, x_TE.shape[1])
    z_TPU = float32_product(x_TE, w_FE).reshape(x_TE.shape[0], *b_PU.shape)
    return z_TPU + b_PU.astype(jnp.float32)[None]


def weighed_units(
    params: dict, x_TE: jax.Array, act: Callable, gate_TX: jax.Array | None = None
) -> jax.Array:
    """What units computed for every token add up to, without b_out: [T, E] of x's dtype.

        sum over groups x of g[x] sum over units w of act(<w_in[x,w], x> + b_in[x,w]) w_out[x,w]

    Pre-activations, activations and gates are float32. g act(z) is rounded to x's dtype once, and so is the
    sum, which is in float32: the precision of every layer (docs/layer.md).

    Args:
      params: {w_in [X,W,E], b_in [X,W], w_out [X,W,E]}; without gates also [F,E] and [F].
      x_TE: tokens.
      act: the activation.
      gate_TX: float32; None: all are 1.
    """
    dtype = x_TE.dtype

    # Recomputed in the backward pass: to store what its derivative needs costs more than to compute it again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hidden(z, gate_TX):
        if gate_TX is None:
            return act(z).astype(dtype)
        gate = gate_TX[..., None]
        # A unit of gate 0 adds nothing, though it be no number; of numbers the gate has its gradient.
        felt = lambda value: jnp.where((gate != 0) | jnp.isfinite(value), value, 0.0)
        return (felt(act(felt(z))) * gate).astype(dtype)

    z = pre_activations(x_TE, params["w_in"], params["b_in"])
    h_TF = hidden(z, gate_TX).reshape(x_TE.shape[0], params["b_in"].size)
    return jnp.einsum("tf,fe->te", h_TF, params["w_out"].astype(dtype).reshape(h_TF.shape[1], x_TE.shape[1]))
