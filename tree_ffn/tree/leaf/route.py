"""Routing: the K experts of every token, and how much each of them counts.

A router gives every expert a log probability. The K best are chosen, of trees possibly by a beam; what
balances the load acts on that choice alone. Gates are the probabilities of the chosen, over their norm;
through them routers learn, by ordinary differentiation. The options are tables in `routers`.
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree.leaf import pruned
from tree_ffn.tree.leaf.hashing import check_ids, hashed
from tree_ffn.tree.leaf.routers import GATE_NORMS, ROUTERS, beam, best
from tree_ffn.tree.leaf.spec import LeafSpec
from tree_ffn.tree.products import float32_product


def route(
    params: dict, x_TE: jax.Array, spec: LeafSpec, token_T: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens use, and their gates.

        ids = the K experts of the highest log p (ties: the lower id; NaN is the lowest),   g = p / norm(p)

    Args:
      params: of the layer: {w_router [R,E], b_router [R]} of `tree`, {w_router [X,E]} of `softmax`,
        {router: {w [X,E]}} of `random`, {salt []} of `hash`; and, where the load is balanced,
        selection_bias, a number for each row of the router, which moves the choice alone: of trees it is
        added to the logits, of flat routers to the probabilities; of a pruned layer kept_row.
      x_TE: tokens.
      spec: the layer.
      token_T: int32 ids of the tokens, which `hash` reads.

    Returns:
      ids_TK int32, of trees ascending and of flat routers from the best on; gates_TK float32.

    Raises:
      InputError: router `hash` without an id for every token.
    """
    if ROUTERS[spec.router].log_p is None:
        return _hashed(params["salt"], x_TE.shape[0], spec, token_T)
    logits_TR = _logits(params, x_TE, spec)
    levels = log_probabilities(logits_TR, spec)
    preferred = jax.lax.stop_gradient(levels)
    if "selection_bias" in params:
        bias_R = params["selection_bias"].astype(jnp.float32)
        move = ROUTERS[spec.router].preferred
        assert move is not None
        preferred = move(jax.lax.stop_gradient(logits_TR), bias_R, spec.n_trees, spec.depth)
    if spec.n_kept:
        preferred = pruned.without_removed(preferred, params["kept_row"])
    ids_TK = choose(preferred, spec)
    log_p_TK = jnp.take_along_axis(levels[-1], ids_TK, axis=1, mode="promise_in_bounds")  # ids are distinct
    return ids_TK, jnp.exp(GATE_NORMS[spec.gate_norm](log_p_TK))


def _hashed(salt, n_tokens: int, spec: LeafSpec, token_T: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if token_T is None:
        raise InputError("token_T: is missing; router 'hash' chooses by the ids of the tokens.")
    check_ids(token_T, n_tokens)
    return hashed(token_T, salt, spec.n_experts)[:, None], jnp.ones((n_tokens, 1), jnp.float32)


def _logits(params, x_TE, spec: LeafSpec) -> jax.Array:
    """Of every row of the router: float32 [T, R]."""
    w_RE = params["w_router"] if ROUTERS[spec.router].trained else params["router"]["w"]
    logits_TR = float32_product(x_TE, w_RE.astype(x_TE.dtype))
    return logits_TR + params["b_router"].astype(jnp.float32)[None] if "b_router" in params else logits_TR


def log_probabilities(logits_TR: jax.Array, spec: LeafSpec) -> list[jax.Array]:
    """Log probability of every node, a list of float32 [T, nodes], the experts' last (see `Router.log_p`)."""
    log_p = ROUTERS[spec.router].log_p
    assert log_p is not None
    return log_p(logits_TR, spec.n_trees, spec.depth)


def choose(levels: list[jax.Array], spec: LeafSpec) -> jax.Array:
    """The K chosen experts, int32 [T, K], by the log probabilities of all nodes."""
    levels = [jnp.where(jnp.isnan(level), -jnp.inf, level) for level in levels]
    return (beam if ROUTERS[spec.router].trees else best)(levels, spec.top_k)
