"""Matrix products whose results need more digits than their operands have."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
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
    return jnp.einsum("...e,fe->...f", x_TE, w_FE, preferred_element_type=jnp.float32)


@float32_product.defjvp
def _tangent(primals, tangents):
    (x_TE, w_FE), (dx_TE, dw_FE) = primals, tangents
    product = lambda x_TE, w_FE: jnp.einsum("...e,fe->...f", x_TE, w_FE)
    # Rounded to the operands' dtype: its transpose rounds the gradient before the two backward products.
    d_TF = (product(dx_TE, w_FE) + product(x_TE, dw_FE)).astype(jnp.float32)
    return float32_product(x_TE, w_FE), d_TF


def pre_activations(x_TE: jax.Array, w_PUE: jax.Array, b_PU: jax.Array) -> jax.Array:
    """z = x w + b of units in P groups: float32 [T, P, U], by one `float32_product`.

    Args:
      x_TE: tokens.
      w_PUE, b_PU: of the units, any floating dtype.
    """
    w_FE = w_PUE.astype(x_TE.dtype).reshape(b_PU.size, x_TE.shape[1])
    z_TPU = float32_product(x_TE, w_FE).reshape(x_TE.shape[0], *b_PU.shape)
    return z_TPU + b_PU.astype(jnp.float32)[None]
