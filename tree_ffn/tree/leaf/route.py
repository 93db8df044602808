"""Routing: the K experts of every token, and how much each of them counts.

A router gives experts log probabilities and chooses K; what balances the load acts on that choice alone.
Gates are the probabilities of the chosen, over their norm; through them routers learn, by ordinary
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
      params: of the layer: {w_router [R,E], b_router [R]} of `tree`, {w_router [X,E]} of `softmax`,
        {router: {w [X,E]}} of `random`, {salt []} of `hash`; and, where the load is balanced,
        selection_bias, a number for each row of the router, which moves the choice alone: of trees it is
        added to the logits, of flat routers to the probabilities; of a pruned layer kept_row.
      x_TE: tokens.
      spec: the layer.
      token_T: int32 ids of the tokens, which `hash` reads.

    Returns:
      ids_TK int32, distinct, in an order of the router's own; gates_TK float32.

    Raises:
      InputError: router `hash` without an id for every token.
    """
    ids_TK, log_p_TK = ROUTERS[spec.router].choose(params, x_TE, spec, token_T)
    return ids_TK, jnp.exp(GATE_NORMS[spec.gate_norm](log_p_TK))
