"""The mixture-of-experts baselines, dropless: token-choice top-k with a softmax gate, or a hash of the id.

Every expert is computed for every token and the unchosen are weighed by zero
(or, in training, by a leak): two GEMMs over all X * W units, exact and simple,
at the cost of the dense layer. That is what a baseline for quality needs; speed
is not claimed for it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.tree import ACTIVATIONS, Info, Leaking, activation
from tree_ffn.tree.gates import gate_norm
from tree_ffn.tree.products import float32_product, weighed_units
from tree_ffn.tree.routing import check_ids, hashed
from tree_ffn.tree.spec import GATE_NORMS
from tree_ffn.tree.usage import leaf_counts

MOE_BALANCES = ("none", "aux", "bias")
MOE_ROUTERS = ("softmax", "hash")


@dataclasses.dataclass(frozen=True)
class MoESpec(Leaking):
    """A layer of X experts, two-layer MLPs of W units each, of which a token uses k.

        F = X W,    A = k W    (the router's own X E weights count in neither)

    Attributes:
      n_experts: X.
      expert_width: W.
      top_k: k.
      expert_groups: G. Of each X / G experts in a row k / G are chosen, by a softmax of their own: with k = G
        every group is a decision among X / G, the flat counterpart of G trees of depth log2(X / G).
      router: `softmax`, learned; or `hash`, one expert by a fixed hash of the token's id, another
        hash in every layer: what routing is worth that neither learns nor looks at the context.
      renormalise: a token's chosen gates, of all groups, are divided by their norm (with k = 1 the gate is
        then the constant 1 and the router learns from the balance term alone).
      gate_norm: which norm: 1, the gates then sum to 1; 2, their squares do.
      balance: `none`; `aux`, the loss of Switch Transformers over each row of text; or `bias`, added
        to the gates for the choice only and moved against the load.
      balance_rate: step of `bias` per update.
      aux_weight: weight of `aux`.
      activation: a name of `tree.activations.ACTIVATIONS`.
      leak, leak_share: what experts add in training that are not chosen (see `Leaking`).

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    n_experts: int
    expert_width: int
    top_k: int = 1
    renormalise: bool = False
    balance: str = "bias"
    balance_rate: float = 1e-3
    aux_weight: float = 1e-2
    activation: str = "gelu"
    router: str = "softmax"
    expert_groups: int = 1
    gate_norm: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("gate_norm", self.gate_norm, GATE_NORMS)
        check_choice("router", self.router, MOE_ROUTERS)
        for field in ("n_experts", "expert_width", "top_k", "expert_groups"):
            check_positive_int(field, getattr(self, field))
        for field in ("n_experts", "top_k"):
            if getattr(self, field) % self.expert_groups:
                raise InputError(
                    f"{field}: {getattr(self, field)} is not allowed with expert_groups = "
                    f"{self.expert_groups}; use a multiple of it."
                )
        if self.top_k > self.n_experts:
            raise InputError(
                f"top_k: {self.top_k} is not allowed; a token can use at most n_experts = {self.n_experts}."
            )
        check_choice("balance", self.balance, MOE_BALANCES)
        check_choice("activation", self.activation, ACTIVATIONS)
        for field in ("balance_rate", "aux_weight"):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"{field}: {getattr(self, field)!r} is not allowed; use a number of at least 0."
                )
        if self.router == "hash" and (self.top_k, self.balance) != (1, "none"):
            raise InputError(
                f"router: 'hash' cannot be used with top_k {self.top_k} and balance {self.balance!r}; an id "
                "names one expert for good: use 1 and 'none'."
            )

    @property
    def router_rows(self) -> int:
        """Rows of w_router: X, or none."""
        return self.n_experts if self.router == "softmax" else 0


def init_params(key, spec: MoESpec, width: int, w_in_scale=1.0, w_out_scale=1.0, param_dtype=jnp.float32):
    """{w_router [X,E], w_in [X,W,E], b_in [X,W], w_out [X,W,E], b_out [E], selection_bias [X]}.

    Standard deviations as for a layer of trees: w_in_scale / sqrt(E) and
    w_out_scale / sqrt(A); the router's is 1 / sqrt(E). Under router `hash` an
    int32 scalar `salt` stands in place of w_router and selection_bias.
    """
    key_router, key_in, key_out = jax.random.split(key, 3)
    units = (spec.n_experts, spec.expert_width)
    active = spec.top_k * spec.expert_width
    if spec.router == "hash":
        router = {"salt": jax.random.randint(key_router, (), 0, 2**31 - 1, jnp.int32)}
    else:
        router = {
            "w_router": jax.random.normal(key_router, (spec.n_experts, width), param_dtype) / width**0.5,
            "selection_bias": jnp.zeros((spec.n_experts,), jnp.float32),
        }
    return router | {
        "w_in": jax.random.normal(key_in, (*units, width), param_dtype) * (w_in_scale / width**0.5),
        "b_in": jnp.zeros(units, param_dtype),
        "w_out": jax.random.normal(key_out, (*units, width), param_dtype) * (w_out_scale / active**0.5),
        "b_out": jnp.zeros((width,), param_dtype),
    }


def moe_ffn(
    params, x_TE: jax.Array, spec: MoESpec, token_T=None, leak: jax.Array | None = None, n_rows: int = 1
) -> tuple[jax.Array, Info]:
    """y = b_out + sum over the chosen experts e of g_e * (act(x w_in_e^T + b_in_e) w_out_e).

        p = softmax(w_router x),  chosen = the k largest of p + selection_bias
        g_e = p_e for the chosen (divided by their norm if `renormalise`), else 0
        aux = aux_weight * X / G * mean over rows of sum_e f_e mean(p_e),  f_e the share of choices of e

    With G groups softmax and choice (of k / G) are those of each group, and the norm is of all k gates.

    Under router `hash` the one chosen expert is `hashed(token, salt, X)` and its gate is 1. With a leak,
    which only training has, the sum is over all experts and

        g_e <- leak + (1 - leak) g_e

    so that at leak 1 the layer is the dense one of all X W units. Gates of p_e for the chosen and leak for
    the others would be another start: p_e is about 1 / X at first, and the chosen would weigh least.

    Args:
      params: as `init_params` gives them; `weighed_units` says in which precision they are used.
      x_TE: tokens [T, E].
      spec: sizes, gate and balance.
      token_T: int32 ids of the tokens, for router `hash`.
      leak: float32 scalar, `MoESpec.leak_at`; None is 0.
      n_rows: rows of text that the T tokens are, of T / n_rows each. f_e and mean(p_e) are those of a
        row: a product of means over a batch would depend on how a step is divided into microbatches.

    Returns:
      y_TE of x's dtype, and Info(chosen experts int32 [T, k], aux).

    Raises:
      InputError: router `hash` without an id for every token.

    Source: Switch Transformers (arXiv 2101.03961, eq. 4-6) for gate and
    auxiliary loss; DeepSeek-V3 (arXiv 2412.19437, eq. 17-20) for taking it of
    each row; Wang et al. 2024 (arXiv 2408.15664) for the selection bias;
    Roller et al. 2021 (arXiv 2106.04426) for the hash.
    """
    if spec.router == "hash":
        if token_T is None:
            raise InputError("token_T: is missing; router 'hash' chooses by the ids of the tokens.")
        check_ids(token_T, len(x_TE))
        chosen_Tk = hashed(token_T, params["salt"], spec.n_experts)[:, None]
        gate_TX, aux_loss = _choices(chosen_Tk, spec), jnp.float32(0.0)
    else:
        chosen_Tk, gate_TX, aux_loss = _softmax_choice(params, x_TE, spec, n_rows)
    if leak is not None:
        gate_TX = leak + (1 - leak) * gate_TX
    return _weighed_experts(params, x_TE, gate_TX, spec), Info(chosen_Tk, aux_loss)


def _choices(chosen_Tk, spec: MoESpec):
    """1 for the chosen experts of every token, 0 for the others: float32 [T, X]."""
    return jax.nn.one_hot(chosen_Tk, spec.n_experts, dtype=jnp.float32).sum(axis=1)


def _softmax_choice(params, x_TE, spec: MoESpec, n_rows: int):
    """Chosen experts int32 [T, k], gates of all experts float32 [T, X], and the auxiliary loss."""
    logits_TX = float32_product(x_TE, params["w_router"].astype(x_TE.dtype))
    T, X, G = len(x_TE), spec.n_experts, spec.expert_groups
    p_TGX = jax.nn.softmax(logits_TX.reshape(T, G, X // G), axis=-1)
    # The choice carries no gradient; the gate does.
    score_TGX = jax.lax.stop_gradient(p_TGX) + params["selection_bias"].reshape(1, G, X // G)
    _, chosen_TGk = jax.lax.top_k(score_TGX, spec.top_k // G)
    chosen_Tk = (chosen_TGk + jnp.arange(0, X, X // G)[None, :, None]).reshape(T, spec.top_k)
    chosen_TX = _choices(chosen_Tk, spec)
    gate_TX = p_TGX.reshape(T, X) * chosen_TX
    if spec.renormalise:
        gate_TX = gate_TX / gate_norm(gate_TX, spec.gate_norm)
    aux_loss = jnp.float32(0.0)
    if spec.balance == "aux" and T:
        share_RX, p_RX = (value.reshape(n_rows, -1, X).mean(axis=1) for value in (chosen_TX, p_TGX))
        aux_loss = spec.aux_weight * X / G / spec.top_k * jnp.sum(share_RX * p_RX, axis=1).mean()
    return chosen_Tk.astype(jnp.int32), gate_TX, aux_loss


def _weighed_experts(params, x_TE, gate_TX, spec: MoESpec):
    """y_TE: every expert's output times its gate."""
    y_TE = weighed_units(params, x_TE, activation(spec.activation), gate_TX)
    return y_TE + params["b_out"].astype(x_TE.dtype)[None, :]


def balance_update(bias_X: jax.Array, chosen_Tk: jax.Array, spec: MoESpec) -> jax.Array:
    """selection_bias += balance_rate * sign(mean load - load): the overloaded are chosen less."""
    load_X = leaf_counts(chosen_Tk.reshape(-1, 1), spec.n_experts)[0].astype(jnp.float32)
    return bias_X + spec.balance_rate * jnp.sign(load_X.mean() - load_X)
