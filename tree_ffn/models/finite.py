"""Weights that are numbers: NaN and infinities are refused where weights come in, before they are answers."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError

CHUNK = 2**20  # elements looked at together: what is asked of them takes one byte each


def check_finite(leaves: Iterable[tuple[str, np.ndarray]], where: str, field: str = "pretrained") -> None:
    """Refuses the first array that has a value which is no finite number.

    Args:
      leaves: names and arrays; of whole numbers too, which are always fine.
      where: the file or directory that they come from.
      field: the first word of the error's sentence.

    Raises:
      InputError: it names the array, the first such value, its index, and how many there are.

    Example:
      >>> check_finite([("w", np.float32([[1, 2], [np.nan, 3]]))], "a.safetensors")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: pretrained: w in 'a.safetensors' is nan at [1, 0] (not finite: 1 of 4 \
values); use a checkpoint without them.
    """
    for name, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (found := _first(leaf)):
            index, value, count = found
            raise InputError(
                f"{field}: {name} in {where!r} is {value} at {list(index)} (not finite: {count:,} of "
                f"{leaf.size:,} values); use a checkpoint without them."
            )


def check_finite_variables(variables, where: str, field: str = "checkpoint") -> None:
    """`check_finite` for a tree of arrays on devices: one number a leaf leaves them where all is well.

    Args:
      variables: the arrays.
      where: the file or directory that they come from.
      field: the first word of the error's sentence.

    Raises:
      InputError: as `check_finite`.
    """
    if all(jax.tree.leaves(jax.device_get(_are_finite(variables)))):
        return
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    check_finite(((name(path), np.asarray(leaf)) for path, leaf in leaves), where, field)


def all_finite(array: np.ndarray) -> bool:
    """Whether every value is a finite number; some rows at a time, so that a view stays a view."""
    step = max(1, CHUNK // max(1, array[:1].size))
    return all(np.isfinite(array[i : i + step]).all() for i in range(0, len(array), step))


@jax.jit
def _are_finite(variables):
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), variables)


def _first(leaf: np.ndarray) -> tuple[tuple[int, ...], float, int] | None:
    """Index and value of the first element that is no finite number, and how many there are."""
    flat, first, count = leaf.reshape(-1), -1, 0
    for start in range(0, flat.size, CHUNK):
        fine = np.isfinite(flat[start : start + CHUNK])
        if not fine.all():
            first = start + int(np.argmin(fine)) if first < 0 else first
            count += fine.size - int(np.count_nonzero(fine))
    if first < 0:
        return None
    return tuple(map(int, np.unravel_index(first, leaf.shape))), float(flat[first]), count
