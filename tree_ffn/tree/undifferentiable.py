"""Arrays that refuse to be differentiated, where a gradient would silently lack a part."""

import jax

from tree_ffn.errors import InputError


def undifferentiable(array: jax.Array, x_TE: jax.Array, said: str) -> jax.Array:
    """The array as it is; whoever differentiates with respect to it or to x gets a sentence.

    Args:
      array: e.g. gates, through which routers would learn.
      x_TE: tokens, which depend on all trained weights before this layer.
      said: the sentence.

    Raises:
      InputError: says `said`, under differentiation in any mode.

    Example:
      >>> float(undifferentiable(jax.numpy.float32(3), jax.numpy.ones((1, 1)), "x: give y."))
      3.0
    """

    @jax.custom_jvp
    def same(array, x_T):
        del x_T
        return array

    @same.defjvp
    def _(primals, tangents):
        raise InputError(said)

    return same(array, x_TE[:, 0])
