"""Routing: the K experts of every token, and how much each of them counts.

A router gives every expert a log probability and chooses K. A balancing bias changes that choice alone.
Gates are the probabilities of the chosen divided by their norm. Routers learn through them, by ordinary
differentiation. The options are tables in `routers`.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS
from tree_ffn.tree.leaf.spec import LeafSpec


def route(
    params: dict, x_TE: jax.Array, spec: LeafSpec, token_T: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens use, and their gates.

        ids, log p = the router's (ties: the lower id; NaN is the lowest),   g = p / norm(p)

    Args:
      params: the layer's: {w_router [R,E], b_router [R]} for `tree`, {w_router [R,E]} for `softmax` and
        `product_keys`, {router: {w [X,E]}} for `random`, {salt []} for `hash`; where the load is balanced
        also selection_bias, which trees add to the logits [R] and flat routers to the probabilities [X];
        where the layer is pruned also kept_row.
      x_TE: tokens.
      spec: the layer.
      token_T: int32 ids of the tokens, which `hash` reads.

    Returns:
      ids_TK int32, distinct, in no promised order; gates_TK float32.

    Raises:
      InputError: router `hash` without an id for every token.
    """
    ids_TK, log_p_TK = ROUTERS[spec.router].choose(params, x_TE, spec, token_T)
    return ids_TK, jnp.exp(GATE_NORMS[spec.gate_norm](log_p_TK))
