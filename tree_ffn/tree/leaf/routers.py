"""The options of routing, a table each: what chooses experts, and how their gates are normed.

A new one is an entry here and a line of `LeafSpec`: first weights, costs and tests read the tables.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tree_ffn.errors import InputError
from tree_ffn.tree.leaf.beam import beam
from tree_ffn.tree.leaf.hashing import check_ids, hashed
from tree_ffn.tree.leaf.order import comparable
from tree_ffn.tree.products import CHOICE, float32_product

Chosen = tuple[jax.Array, jax.Array]


def softmax(logits_TX: jax.Array, n_experts: int) -> jax.Array:
    """Log p of experts that have a row of weights each: log softmax."""
    return jax.nn.log_softmax(logits_TX, axis=-1)


def rectangle(n_experts: int) -> tuple[int, int]:
    """The two nearest numbers whose product is X, the smaller one first.

    Example:
      >>> rectangle(512), rectangle(400)
      ((16, 32), (20, 20))
    """
    height = next(n for n in range(math.isqrt(n_experts), 0, -1) if n_experts % n == 0)
    return height, n_experts // height


def product_keys(logits_TR: jax.Array, n_experts: int) -> jax.Array:
    """Log p of experts in a rectangle, whose rows and columns have the logits.

        log p(i, j) = log softmax(logits of rows)[i] + log softmax(logits of columns)[j]

    Source: Lample et al. 2019 (arXiv 1907.05242), who give each half of the token to one of the two; here
    both read the whole token.
    """
    height = rectangle(n_experts)[0]
    a_TI, b_TJ = (jax.nn.log_softmax(r, axis=-1) for r in jnp.split(logits_TR, [height], axis=-1))
    return (a_TI[:, :, None] + b_TJ[:, None, :]).reshape(logits_TR.shape[0], n_experts)


def flat(log_p: Callable[[jax.Array, int], jax.Array]) -> Callable[..., Chosen]:
    """A router that scores all experts and chooses the K best.

    Where the load is balanced they are the best of p + bias (Wang et al. 2024, arXiv 2408.15664).

    Args:
      log_p: from the logits of the router's rows, [T, R], and X to the log p of all experts, [T, X].
    """

    def choose(params: dict, x_TE: jax.Array, spec, token_T: jax.Array | None) -> Chosen:
        w_RE = params["w_router"] if "w_router" in params else params["router"]["w"]
        log_p_TX = log_p(float32_product(x_TE, w_RE.astype(x_TE.dtype)), spec.n_experts)
        score_TX = jax.lax.stop_gradient(log_p_TX)
        if "selection_bias" in params:
            score_TX = jnp.exp(score_TX) + params["selection_bias"].astype(jnp.float32)[None]
        is_there_TX = (params["kept_row"] >= 0)[None] if spec.n_kept else None
        ids_TK = checkpoint_name(jax.lax.top_k(comparable(score_TX, is_there_TX), spec.top_k)[1], CHOICE)
        return ids_TK, jnp.take_along_axis(log_p_TX, ids_TK, axis=1, mode="promise_in_bounds")

    return choose


def by_hash(params: dict, x_TE: jax.Array, spec, token_T: jax.Array | None) -> Chosen:
    """The token's id names its expert, for sure.

    Args:
      params: the layer's, of which salt is read.
      x_TE: tokens; only their number counts.
      spec: the layer.
      token_T: int32 ids of the tokens; None is refused.
    """
    if token_T is None:
        raise InputError("token_T: is missing; router 'hash' chooses by the ids of the tokens.")
    check_ids(token_T, x_TE.shape[0])
    ids_T = hashed(token_T, params["salt"], spec.n_experts)
    return ids_T[:, None], jnp.zeros((x_TE.shape[0], 1), jnp.float32)


class Router(NamedTuple):
    """What chooses the experts.

    Attributes:
      choose: (params, tokens, LeafSpec, ids of the tokens) to the experts, int32 [T, K], and their log
        probabilities, float32 [T, K].
      rows: (X, P) to R, rows of weights.
      trees: experts are leaves of P trees; rows have biases.
      trained: rows are parameters; False: they stay as they were drawn.
      by_id: the token's id names one expert for good.
    """

    choose: Callable[..., Chosen]
    rows: Callable[[int, int], int]
    trees: bool = False
    trained: bool = True
    by_id: bool = False


ROUTERS = {
    "tree": Router(lambda params, x_TE, spec, _: beam(params, x_TE, spec), lambda X, P: X - P, trees=True),
    "softmax": Router(flat(softmax), lambda X, _: X),
    "product_keys": Router(flat(product_keys), lambda X, _: sum(rectangle(X))),
    "hash": Router(by_hash, lambda *_: 0, trained=False, by_id=True),
    "random": Router(flat(softmax), lambda X, _: X, trained=False),
}

# log p [T, K] of the chosen to logarithms of gates: probabilities may underflow, their ratios do not.
GATE_NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda log_p: log_p,
    "l1": lambda log_p: jax.nn.log_softmax(log_p, axis=-1),
    "l2": lambda log_p: log_p - 0.5 * jax.nn.logsumexp(2 * log_p, axis=-1, keepdims=True),
    "rms": lambda log_p: GATE_NORMS["l2"](log_p) + 0.5 * math.log(log_p.shape[-1]),
}
