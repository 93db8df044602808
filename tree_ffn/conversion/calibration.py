"""What goes into a model's feed-forward layers, over some text."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tree_ffn.data.cache import RowSource
from tree_ffn.data.pipeline import first_rows
from tree_ffn.errors import InputError, check_metric, check_positive_int
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Transformer
from tree_ffn.training.restore import Restored
from tree_ffn.training.sharding import filled_up, put_batch


def ffn_inputs(run: Restored, sources: Sequence[RowSource], tokens: int, batch_size: int = 16) -> list:
    """The inputs of every feed-forward layer for at least `tokens` tokens: float32 [T, E] each.

    Args:
      run: a restored run.
      sources: rows of the model's context + 1 tokens, read in the fixed order of validation, never twice.
      tokens: how many, T.
      batch_size: rows a batch.

    Raises:
      InputError: the text has not so many.
      NotFinite: names the first layer whose inputs are NaN or infinite.
    """
    check_positive_int("batch_size", batch_size)
    there = sum(map(len, sources)) * run.model.max_seq_len
    if there < tokens:
        raise InputError(
            f"calibration: the text has {there:,} tokens, and {tokens:,} are needed; use more text."
        )
    size = 0
    parts: list[list[np.ndarray]] = [[] for _ in run.model.ffns]
    with jax.set_mesh(run.mesh):
        for batch in first_rows(sources, -(-tokens // run.model.max_seq_len), batch_size):
            filled = filled_up(batch, run.mesh, size)
            size, read = len(filled), len(batch) * run.model.max_seq_len
            inputs = _inputs(run.variables, put_batch(filled, run.mesh), model=run.model)
            for part, x_TE in zip(parts, jax.device_get(inputs)):
                part.append(x_TE[:read].astype(np.float32))
    found = [np.concatenate(part)[:tokens] for part in parts]
    for layer, x_TE in enumerate(found):
        check_metric(f"inputs of layer {layer} on the calibration text", float(np.abs(x_TE).max(initial=0.0)))
    return found


@functools.partial(jax.jit, static_argnames=("model",))
def _inputs(variables: dict, batch: jax.Array, model: ModelSpec) -> list[jax.Array]:
    """[T, E] of every layer."""
    sown: Any
    _, sown = Transformer(model).apply(variables, batch[:, :-1], mutable=["intermediates"])
    layers = []
    for i, (_, length) in enumerate(model.runs):
        (x_LBCE,) = sown["intermediates"][f"run_{i}"]["ffn"]["x"]
        layers += [x_LBCE[j].reshape(-1, model.width) for j in range(length)]
    return layers
