"""Activation functions by name: one table, each entry with its source.

Names that differ only in an approximation are different names: `gelu` is the
exact form with erf, `gelu_tanh` its tanh approximation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tree_ffn.errors import check_choice


def _gelu(z: jax.Array) -> jax.Array:
    """z Phi(z) by erf, in float32 at least: erfc, as in `jax.nn.gelu`, takes CPUs five times as long.

    It keeps 1e-7 of z, and not of Phi(z), where z is far below 0.
    """
    x = z if z.dtype == jnp.float64 else z.astype(jnp.float32)
    return (x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))).astype(z.dtype)


def _relu2(z: jax.Array) -> jax.Array:
    positive = jax.nn.relu(z)
    return positive * positive


def absolute(z: jax.Array) -> jax.Array:
    """|z| with derivative sign(z), so 0 at 0, where that of `jnp.abs` is 1."""
    return z * jnp.sign(z)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # z * Phi(z), Hendrycks & Gimpel 2016 (arXiv 1606.08415); UltraFastBERT's choice.
    "gelu": _gelu,
    # The tanh approximation of the same paper; GPT-2's choice.
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    # max(z, 0), Nair & Hinton 2010; OPT's choice.
    "relu": jax.nn.relu,
    # max(z, 0)^2, So et al. 2021, Primer (arXiv 2109.08668).
    "relu2": _relu2,
    # max(z, 0) + slope * min(z, 0), Maas et al. 2013.
    "leaky_relu": jax.nn.leaky_relu,
    # z * sigmoid(z), Elfwing et al. 2017 (arXiv 1702.03118), "swish".
    "silu": jax.nn.silu,
    # Odd-symmetric and bounded.
    "tanh": jnp.tanh,
    # No activation: sap-ient-ai/FFF's choice.
    "identity": lambda z: z,
    # Even-symmetric: both sides of a decision work alike. Its gradient at 0 is 0.
    "abs": absolute,
    # log(1 + exp(z)), Dugas et al. 2001.
    "softplus": jax.nn.softplus,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function called `name`.

    Args:
      name: one of `ACTIVATIONS`.

    Raises:
      InputError: `name` is not known; the message lists the known names.

    Example:
      >>> float(activation("relu2")(jnp.float32(3.0)))
      9.0
    """
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
