"""The layers of a model one by one: taken out of its runs, and stacked into runs again."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tree_ffn.models.spec import FFNSpec, ModelSpec


def split_layers(model: ModelSpec, variables: dict) -> list[dict]:
    """The arrays of every layer, first to last: {"params": {...}, "routing": {"ffn": ...} where it has any}.

    The inverse of `stack_layers` but for the arrays outside the layers.
    """
    layers = []
    for i, (_, length) in enumerate(model.runs):
        run = {name: part[f"run_{i}"] for name, part in variables.items() if f"run_{i}" in part}
        layers += [jax.tree.map(lambda leaf, j=j: leaf[j], run) for j in range(length)]
    return layers


def stack_layers(
    model: ModelSpec, variables: dict, ffns: Sequence[FFNSpec], layers: list[dict]
) -> tuple[ModelSpec, dict]:
    """The model with other feed-forward layers: its runs are found anew.

    Args:
      model: the model as it was.
      variables: its arrays; what is outside its layers is kept.
      ffns: the feed-forward layer of every layer.
      layers: their arrays, as `split_layers` gives them.

    Returns:
      spec and variables; the layers' arrays as NumPy arrays.

    Example:
      >>> layers = split_layers(model, variables)                             # doctest: +SKIP
      >>> stack_layers(model, variables, model.ffns, layers)[0] == model      # doctest: +SKIP
      True
    """
    model = dataclasses.replace(model, ffns=tuple(ffns))
    new = {
        name: {key: value for key, value in part.items() if not key.startswith("run_")}
        for name, part in variables.items()
    }
    for run, parts in stack_runs(model, layers).items():
        for name, part in parts.items():
            new.setdefault(name, {})[run] = part
    return model, new


def stack_runs(model: ModelSpec, layers: Sequence[dict]) -> dict[str, dict]:
    """{run_i: arrays of its layers, stacked}, of one tree of arrays a layer."""
    runs, first = {}, 0
    for i, (_, length) in enumerate(model.runs):
        runs[f"run_{i}"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers[first : first + length])
        first += length
    return runs
