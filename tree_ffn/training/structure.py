"""In which leaf two trees of arrays differ: a checkpoint's and a model's."""

from collections.abc import Container

import jax
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.training.sharding import path_name


def leaves_of(tree) -> dict[str, tuple]:
    """{path: (shape, dtype)} of the leaves of a tree of arrays or of orbax metadata."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flat}


def compare_leaves(source: str, saved, wanted, but: Container[str] = ()) -> None:
    """Raises InputError that names the first leaf in which two trees differ.

    Args:
      source: the checkpoint that `saved` comes from.
      saved: tree of arrays, shapes or orbax metadata.
      wanted: the tree that the model needs.
      but: paths that do not matter.

    Example:
      >>> f = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
      >>> compare_leaves("runs/a", {"w_in": f(2, 3)}, {"w_in": f(2, 4)})
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: checkpoint: w_in of runs/a is float32[2,3]; this model needs float32[2,4].
    """
    saved, wanted = leaves_of(saved), leaves_of(wanted)
    for name in sorted(name for name in saved.keys() | wanted.keys() if name not in but):
        if name not in saved:
            raise InputError(f"checkpoint: {source} has no {name}; this model needs {_said(wanted[name])}.")
        if name not in wanted:
            raise InputError(f"checkpoint: {source} has {name}, {_said(saved[name])}; this model has not.")
        if saved[name] != wanted[name]:
            raise InputError(
                f"checkpoint: {name} of {source} is {_said(saved[name])}; "
                f"this model needs {_said(wanted[name])}."
            )


def _said(leaf: tuple) -> str:
    """float32[2,3]"""
    shape, dtype = leaf
    return f"{dtype.name}[{','.join(map(str, shape))}]"
