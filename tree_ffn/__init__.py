"""Tree-structured sparse feed-forward layers in JAX and Flax.

The legend of dimension letters, used as suffixes of array names (`x_TE` is an
array of shape [T, E]) and as the subscripts of einsum strings:

    B  batch                        E  model width
    C  context positions            P  trees
    T  tokens (B * C flattened)     D  depth of a tree (decisions on a path)
    V  vocabulary                   L  levels, D + 1
    H  attention heads              N  nodes of a tree, 2 ** L - 1
    K  width of a head              W  units of a node, or of an expert
    X  experts                      U  units of a tree
                                    F  units of a layer: P * U, or X * W
                                    A  active units of a token

K is also the number of experts that a token uses.

Two more appear inside one function only: J for the nodes of one level
(2 ** l of them) and R for the deciding nodes of a tree (the first
2 ** D - 1 in heap order; the bottom level decides nothing).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; `_HOMES` says the same to Python
    from tree_ffn.analysis.prune import prune_model
    from tree_ffn.config import make_config
    from tree_ffn.conversion.convert import convert_model
    from tree_ffn.errors import InputError
    from tree_ffn.models.dense import DenseSpec
    from tree_ffn.models.export import load, save
    from tree_ffn.models.ffn import FFN, apply_ffn, init_ffn, split_params, update_routing
    from tree_ffn.models.spec import ModelSpec
    from tree_ffn.models.transformer import Transformer
    from tree_ffn.training.loop import train
    from tree_ffn.tree.activations import ACTIVATIONS
    from tree_ffn.tree.combine import IMPLEMENTATIONS, combine
    from tree_ffn.tree.info import Info
    from tree_ffn.tree.leaf import LeafSpec, leaf_ffn
    from tree_ffn.tree.path import PrunedSpec, TreeSpec, tree_ffn
    from tree_ffn.tree.shape import TreeShape

__version__ = "0.1.0"

# Where the public names are: they are imported when they are asked for, so that the layers come without Flax,
# and the models without what trains them.
_HOMES = {
    "tree.activations": ("ACTIVATIONS",),
    "tree.combine": ("IMPLEMENTATIONS", "combine"),
    "tree.info": ("Info",),
    "tree.leaf": ("LeafSpec", "leaf_ffn"),
    "tree.path": ("PrunedSpec", "TreeSpec", "tree_ffn"),
    "tree.shape": ("TreeShape",),
    "models.dense": ("DenseSpec",),
    "models.export": ("load", "save"),
    "models.ffn": ("FFN", "apply_ffn", "init_ffn", "split_params", "update_routing"),
    "models.spec": ("ModelSpec",),
    "models.transformer": ("Transformer",),
    "conversion.convert": ("convert_model",),
    "analysis.prune": ("prune_model",),
    "training.loop": ("train",),
    "config": ("make_config",),
    "errors": ("InputError",),
}
_HOME = {name: f"tree_ffn.{module}" for module, names in _HOMES.items() for name in names}

__all__ = ["recipe", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tree_ffn' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


def recipe(width: int) -> "LeafSpec":
    """The recommended layer of a model of width E: 512 experts behind one tree, of which a token uses 16.

    F = 4 E units as a dense layer has, A = E / 8. A token needs 2 A + 95 products of E numbers, routing
    counted: 4.7 % of dense's 2 F at E = 768. It was measured with first weights of `w_in_scale` 0.7 and
    `w_out_scale` 0.2 (configs/sweeps/leaves.py) and with its dense start: in the first fifth of a training
    experts that are not chosen add something too, with a weight that falls from 1 to 0. So say in every
    training step how much is `done`.

    Args:
      width: E, a multiple of 128.

    Raises:
      InputError: another width.

    Example:
      A training loop of one's own. In plain JAX `leaf_ffn(params, x, spec, leak=spec.leak_at(done))` is the
      layer; in NNX `flax.nnx.bridge.ToNNX(FFN(spec, ...), rngs=rngs)` takes `done=done` too.

      >>> import jax, jax.numpy as jnp, optax
      >>> from tree_ffn import FFN
      >>> layer = FFN(recipe(128), w_in_scale=0.7, w_out_scale=0.2)
      >>> x = jax.random.normal(jax.random.key(0), (8, 128))
      >>> params, optimizer, steps = jax.jit(layer.init)(jax.random.key(1), x)["params"], optax.lion(1e-3), 4
      >>> @jax.jit
      ... def train_step(params, state, step):
      ...     def loss(params):
      ...         y, _ = layer.apply({"params": params}, x, done=step / steps)
      ...         return jnp.square(y - x[:, ::-1]).mean()
      ...     value, grads = jax.value_and_grad(loss)(params)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, value
      >>> state, losses = optimizer.init(params), []
      >>> for step in range(steps):
      ...     params, state, value = train_step(params, state, jnp.float32(step))
      ...     losses.append(float(value))
      >>> losses[-1] < losses[0]
      True
    """
    from tree_ffn.errors import InputError, check_positive_int
    from tree_ffn.tree.leaf.spec import RECIPE, LeafSpec

    check_positive_int("width", width)
    if width % 128:
        raise InputError(f"width: {width} is not allowed; use a multiple of 128.")
    return LeafSpec(expert_width=width // 128, **RECIPE)
