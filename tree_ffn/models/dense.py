"""The dense baseline: the ordinary two-layer MLP, also called `narrow` when it is small."""

import dataclasses

import jax
import jax.numpy as jnp

from tree_ffn.errors import check_choice, check_positive_int
from tree_ffn.tree import ACTIVATIONS, Info, activation
from tree_ffn.tree.products import weighed_units


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A dense feed-forward layer of F units, every one of them active.

    Attributes:
      width: F.
      activation: a name of `tree.activations.ACTIVATIONS`.

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    width: int
    activation: str = "gelu"

    def __post_init__(self):
        check_positive_int("width", self.width)
        check_choice("activation", self.activation, ACTIVATIONS)


def init_params(key, spec: DenseSpec, width: int, w_in_scale=1.0, w_out_scale=1.0, param_dtype=jnp.float32):
    """{w_in [F,E], b_in [F], w_out [F,E], b_out [E]}.

    Standard deviations are w_in_scale / sqrt(E) and w_out_scale / sqrt(F); biases are 0.

    Args:
      key: random key.
      spec: the layer.
      width: E, of tokens.
      w_in_scale: of the standard deviation of w_in.
      w_out_scale: the same of w_out.
      param_dtype: of all arrays.
    """
    key_in, key_out = jax.random.split(key)
    shape = (spec.width, width)
    return {
        "w_in": jax.random.normal(key_in, shape, param_dtype) * (w_in_scale / width**0.5),
        "b_in": jnp.zeros((spec.width,), param_dtype),
        "w_out": jax.random.normal(key_out, shape, param_dtype) * (w_out_scale / spec.width**0.5),
        "b_out": jnp.zeros((width,), param_dtype),
    }


def dense_ffn(params, x_TE: jax.Array, spec: DenseSpec) -> tuple[jax.Array, Info]:
    """y = act(x w_in^T + b_in) w_out + b_out.

    Args:
      params: as `init_params` gives them; `weighed_units` says in which precision they are used.
      x_TE: tokens [T, E].
      spec: width and activation.

    Returns:
      y_TE of x's dtype, and an Info without leaves.

    Example:
      >>> spec = DenseSpec(width=8)
      >>> params = init_params(jax.random.key(0), spec, width=4)
      >>> dense_ffn(params, jnp.ones((3, 4)), spec)[0].shape
      (3, 4)
    """
    y_TE = weighed_units(params, x_TE, activation(spec.activation))
    y_TE = y_TE + params["b_out"].astype(x_TE.dtype)[None, :]
    no_leaves = jnp.zeros((x_TE.shape[0], 0), jnp.int32)
    return y_TE, Info(no_leaves)
