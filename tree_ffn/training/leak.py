"""What leaks from units off the path, and from experts that are not chosen, while a model is trained.

Hard paths leave most units without a token that could teach them, and a token
learns nothing of the paths it did not take. So training may begin with a layer
that is in part dense: off its path a unit adds a share of what it would add on
it, the leak, which falls to 0 long before the end (`Leaking.leak_at`). What is
validated, saved and run has no leak. Experts are chosen as hard as paths are,
and have the same start.

Source: the idea of beginning dense and ending sparse is that of EvoMoE's gate (Nie et al. 2021,
arXiv 2112.14397); there a softmax's temperature falls.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp

from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.tree import Leaking
from tree_ffn.tree.leaf import LeafSpec


def leaks(ffn: FFNSpec) -> TypeGuard[Leaking | LeafSpec]:
    """Whether a layer's units off the path, or experts that are not chosen, add anything in training."""
    return isinstance(ffn, Leaking | LeafSpec) and ffn.leak > 0


def with_leaks(variables: dict, model: ModelSpec, done: jax.Array) -> dict:
    """`variables` with the collection "leak": one number a layer that leaks; as they are where none does.

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
