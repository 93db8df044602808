"""The arrays of a layer: their shapes, and what they hold at first."""

import jax
import jax.numpy as jnp

from tree_ffn.tree import pruned
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.spec import PrunedSpec, TreeSpec


def init_params(
    key: jax.Array,
    spec: TreeSpec,
    width: int,
    *,
    w_in_scale: float = 1.0,
    w_out_scale: float = 1.0,
    param_dtype=jnp.float32,
) -> dict:
    """Initial weights: normal w_in and w_out, zero biases and thresholds.

        std(w_in) = w_in_scale / sqrt(E),   std(w_out) = w_out_scale / sqrt(A)

    A, not F, is the fan-in of an output: that many units reach it.

    Args:
      key: a typed PRNG key.
      spec: the layer.
      width: E.
      w_in_scale: see above.
      w_out_scale: see above.
      param_dtype: of w_in, b_in, w_out and b_out.

    Returns:
      {w_in [P,U,E], b_in [P,U], w_out [P,U,E] (without silent routers), b_out [E], threshold [P,N],
      shared: {w_in [S,E], b_in [S], w_out [S,E]} if S > 0,
      router: {w [P,R,E]} under router `frozen`, salt [P] with `hash_levels`}; the last
      two and the thresholds are not trained. Of a PrunedSpec, the arrays of `pruned` with some
      structure of these sizes.
    """
    shape = spec.shape
    keys = jax.random.split(key, 5)
    in_std, out_std = w_in_scale / width**0.5, w_out_scale / spec.active_units**0.5
    shapes = array_shapes(spec, width)
    params = {
        "w_in": _normal(keys[0], shapes["w_in"], in_std, param_dtype),
        "b_in": jnp.zeros(shapes["b_in"], param_dtype),
        "w_out": _normal(keys[1], shapes["w_out"], out_std, param_dtype),
        "b_out": jnp.zeros(shapes["b_out"], param_dtype),
        "threshold": jnp.zeros(shapes["threshold"], jnp.float32),
    }
    if isinstance(spec, PrunedSpec):
        params |= jax.tree.map(jnp.asarray, pruned.init_structure(spec))
    if shape.shared_width:
        params["shared"] = {
            "w_in": _normal(keys[2], shapes["shared.w_in"], in_std, param_dtype),
            "b_in": jnp.zeros(shapes["shared.b_in"], param_dtype),
            "w_out": _normal(keys[3], shapes["shared.w_out"], out_std, param_dtype),
        }
    if spec.router == "frozen":
        params["router"] = {"w": _normal(keys[4], shapes["router.w"], in_std, jnp.float32)}
    if spec.hash_levels:
        params["salt"] = jax.random.randint(keys[4], shapes["salt"], 0, 2**31 - 1, jnp.int32)
    return params


def _normal(key, shape, std, dtype):
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def array_shapes(spec, width) -> dict[str, tuple[int, ...]]:
    """Shape of every array that a layer needs, by its path in `params`."""
    shape, shapes = spec.shape, {"b_out": (width,)}
    if shape.shared_width:
        S = shape.shared_width
        shapes |= {"shared.w_in": (S, width), "shared.b_in": (S,), "shared.w_out": (S, width)}
    if spec.hash_levels:
        shapes["salt"] = (shape.n_trees,)
    if isinstance(spec, PrunedSpec):
        return shapes | pruned.array_shapes(spec, width)
    units = (shape.n_trees, shape.tree_units)
    shapes |= {"w_in": (*units, width), "b_in": units}
    shapes["w_out"] = (shape.n_trees, layout_of(spec).outputs.unit_starts[-1], width)
    shapes["threshold"] = (shape.n_trees, shape.n_nodes)
    if spec.router == "frozen":
        shapes["router.w"] = (shape.n_trees, shape.n_deciding, width)
    return shapes
