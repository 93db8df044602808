"""Routers: the K experts of every token, and how much each of them counts.

A router gives every expert a log probability. The K best are chosen, of trees possibly by a beam; what
balances the load acts on that choice alone. Gates are the probabilities of the chosen, over their norm;
through them routers learn, by ordinary differentiation.
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree.leaf.spec import LeafSpec
from tree_ffn.tree.products import float32_product
from tree_ffn.tree.routing import check_ids, hashed


def route(
    params: dict, x_TE: jax.Array, spec: LeafSpec, token_T: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens use, and their gates.

        ids = the K experts of the highest log p (ties: the lower id; NaN is the lowest),   g = p / norm(p)

    Args:
      params: of the layer: {w_router [R,E], b_router [R]} of `tree`, {w_router [X,E]} of `softmax`,
        {router: {w [X,E]}} of `random`, {salt []} of `hash`; and, where the load is balanced,
        selection_bias, a number for each row of the router, added to its logit for the choice alone.
      x_TE: tokens.
      spec: the layer.
      token_T: int32 ids of the tokens, which `hash` reads.

    Returns:
      ids_TK int32, ascending under `search="beam"` and from the best on otherwise; gates_TK float32.

    Raises:
      InputError: router `hash` without an id for every token.
    """
    if spec.router == "hash":
        if token_T is None:
            raise InputError("token_T: is missing; router 'hash' chooses by the ids of the tokens.")
        n_tokens = x_TE.shape[0]
        check_ids(token_T, n_tokens)
        ids_TK = hashed(token_T, params["salt"], spec.n_experts)[:, None]
        return ids_TK, jnp.ones((n_tokens, 1), jnp.float32)
    logits_TR = _logits(params, x_TE, spec)
    preferred_TR = jax.lax.stop_gradient(logits_TR)
    if "selection_bias" in params:
        preferred_TR = preferred_TR + params["selection_bias"].astype(jnp.float32)[None]
    ids_TK = choose(log_probabilities(preferred_TR, spec), spec)
    return ids_TK, _gates(_picked(log_probabilities(logits_TR, spec)[-1], ids_TK), spec.gate_norm)


def _logits(params, x_TE, spec: LeafSpec) -> jax.Array:
    """Of every row of the router: float32 [T, R]."""
    w_RE = params["router"]["w"] if spec.router == "random" else params["w_router"]
    logits_TR = float32_product(x_TE, w_RE.astype(x_TE.dtype))
    return logits_TR + params["b_router"].astype(jnp.float32)[None] if spec.router == "tree" else logits_TR


def log_probabilities(logits_TR: jax.Array, spec: LeafSpec) -> list[jax.Array]:
    """Log probability of every node, a list of float32 [T, nodes], the experts' last.

    A flat router has one level. Of trees, r[n] the logit of node n, s the logistic function:

        log p(root) = 0,   log p(child of n) = log p(n) + log s(r[n]) to the right, log s(-r[n]) to the left

    Args:
      logits_TR: of the router's rows: of trees level by level from the roots, in each level tree by tree.
      spec: the layer.
    """
    if spec.router != "tree":
        return [jax.nn.log_softmax(logits_TR, axis=-1)]
    n_tokens, end = logits_TR.shape[0], 0
    levels = [jnp.zeros((n_tokens, spec.n_trees), jnp.float32)]
    for level in range(spec.depth):
        start, end = end, end + spec.n_trees * 2**level
        r = logits_TR[:, start:end]
        sides = levels[-1][..., None] + jax.nn.log_sigmoid(jnp.stack([-r, r], axis=-1))
        levels.append(sides.reshape(n_tokens, 2 * (end - start)))
    return levels


def choose(levels: list[jax.Array], spec: LeafSpec) -> jax.Array:
    """The K chosen experts, int32 [T, K], by the log probabilities of all nodes."""
    levels = [jnp.where(jnp.isnan(level), -jnp.inf, level) for level in levels]
    if spec.search == "best":
        return jax.lax.top_k(levels[-1], spec.top_k)[1]
    first = next(i for i, level in enumerate(levels) if level.shape[1] >= spec.top_k)
    kept_TK = jnp.sort(jax.lax.top_k(levels[first], spec.top_k)[1], axis=1)
    for level in levels[first + 1 :]:
        # Ascending, so that of equal nodes the one of the lower number is kept.
        below = jnp.stack([2 * kept_TK, 2 * kept_TK + 1], axis=-1).reshape(kept_TK.shape[0], -1)
        best = jax.lax.top_k(jnp.take_along_axis(level, below, axis=1), spec.top_k)[1]
        kept_TK = jnp.sort(jnp.take_along_axis(below, best, axis=1), axis=1)
    return kept_TK


def _picked(log_p_TX: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """log_p[t, ids[t, k]]: a sum over a mask, since the gradient of a gather is a contended scatter."""
    mine_TKX = ids_TK[..., None] == jnp.arange(log_p_TX.shape[1], dtype=ids_TK.dtype)[None, None]
    return jnp.where(mine_TKX, log_p_TX[:, None], 0.0).sum(axis=-1)


def _gates(log_p_TK: jax.Array, norm: str) -> jax.Array:
    """p over its norm, from logarithms: probabilities may underflow, their ratios do not."""
    if norm == "l1":
        log_p_TK = jax.nn.log_softmax(log_p_TK, axis=-1)
    elif norm == "l2":
        log_p_TK = log_p_TK - 0.5 * jax.nn.logsumexp(2 * log_p_TK, axis=-1, keepdims=True)
    return jnp.exp(log_p_TK)
