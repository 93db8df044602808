"""What leaks from experts that are not chosen while a model begins dense.

A choice leaves most experts without a token that could teach them, and a token learns nothing of those it did
not take. So training may begin dense: an expert that is not chosen adds a share of itself, the leak, which
falls to 0 long before the end (`LeafSpec.leak_at`). What is validated, saved and run has no leak.

Source: the idea of beginning dense and ending sparse is that of EvoMoE's gate (Nie et al. 2021,
arXiv 2112.14397); there a softmax's temperature falls.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp

from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.tree import LeafSpec


def leaks(ffn: FFNSpec) -> TypeGuard[LeafSpec]:
    """Whether experts that are not chosen add anything in training."""
    return isinstance(ffn, LeafSpec) and ffn.dense_start > 0


def with_leaks(variables: dict, model: ModelSpec, done: jax.Array) -> dict:
    """`variables` with the collection "leak": one number a layer with a dense start; as they are without.

    Args:
      variables: {"params", "routing"} of the model.
      model: the model.
      done: share of the training that is over, a float32 scalar.
    """
    found = {
        f"run_{i}": {"ffn": {"leak": jnp.full(length, ffn.leak_at(done))}}
        for i, (ffn, length) in enumerate(model.runs)
        if leaks(ffn)
    }
    return variables | ({"leak": found} if found else {})
