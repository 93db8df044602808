"""What better decisions would be worth: leaves moved to where the loss itself is lower, a layer at a time.

The layer's input, and so what every unit would do, stays as it is; only leaves move. With g[t] the gradient
of the summed loss by the layer's output for token t, a path is to first order worth

    v[t, p, j] = sum_{units u on path j of tree p} a[t, p, l(u)] act(z[t, p, u]) <w_out[p, u], g[t]>

with a the gate of the model's own path at each level l (1 but under continuous routing), which stays: what is
asked is where a token should have gone, not how much should have come of it. And a round moves a token in the
one tree where v falls most, for those tokens of which that is most: all, a half, a quarter, ... or none,
whichever gives the lowest loss. So the loss never rises, and what is found is less than what the best leaves
would give.

The loss knows the next token and no router does: it falls even where no decision was wrong. It bounds what
routing can lose, and does not say what it loses; a model whose decisions are random says how to read it.
"""

import functools
from typing import Any, NamedTuple, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_figure, check_positive_int
from tree_ffn.models.ffn import FFN
from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.models.transformer import Transformer, padded_logits, unrolled
from tree_ffn.training.losses import token_losses
from tree_ffn.training.probe import can_probe
from tree_ffn.tree import TreeSpec, masked
from tree_ffn.tree.apply import finish
from tree_ffn.tree.blocks import path_of_leaves
from tree_ffn.tree.layout import layout_of

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.0)


class Oracle(NamedTuple):
    """What moving the leaves of one layer gives.

    Attributes:
      losses: nats a token, with the model's own leaves and after every round.
      moved: share of (token, tree) pairs whose leaf is another than the model's.
    """

    losses: tuple[float, ...]
    moved: float


class _Layer(NamedTuple):
    """One layer on some tokens: what does not change when leaves move, and its own leaves.

    Attributes:
      h_TPU: a act(z) of every unit, on the path or not.
      w_out_PUE: its weights.
      beside_TE: what the layer adds beside its trees.
      leaf_TP: where tokens go.
    """

    h_TPU: jax.Array
    w_out_PUE: jax.Array
    beside_TE: jax.Array
    leaf_TP: jax.Array


def can_move(ffn: FFNSpec) -> TypeGuard[TreeSpec]:
    """Whether a layer is of whole trees whose units add up as they are."""
    return can_probe(ffn) and ffn.act_site == "node"


def better_leaves(model: ModelSpec, variables: dict, rows_BC: jax.Array, layer: int, rounds: int) -> Oracle:
    """Moves the leaves of one layer of trees to where the loss is lower.

    Args:
      model, variables: of a trained model.
      rows_BC: int32 tokens; all but the first of a row are predicted.
      layer: which layer, from 0.
      rounds: of moves; a token moves in one tree a round.

    Raises:
      InputError: there is no such layer, or it is not of whole trees with the activation at the nodes.
    """
    check_positive_int("rounds", rounds)
    if not 0 <= layer < model.n_layers:
        raise InputError(f"layer: {layer} is not allowed; the model has layers 0 to {model.n_layers - 1}.")
    if not can_move(model.ffns[layer]):
        raise InputError(
            f"layer: {layer} is not allowed; leaves are moved in layers of whole trees with the activation "
            "at the nodes."
        )
    model, variables = unrolled(model, variables)
    here = _seen(variables, rows_BC, model=model, layer=layer)
    leaf_TP, losses = here.leaf_TP, []
    for _ in range(rounds):
        before, after, leaf_TP = _round(variables, rows_BC, here, leaf_TP, model=model, layer=layer)
        losses = [*(losses or [float(before)]), float(after)]
        check_figure(f"loss with moved leaves of layer {layer}", sum(losses))
    return Oracle(tuple(losses), float(jnp.mean(leaf_TP != here.leaf_TP)))


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _seen(variables, rows_BC, *, model: ModelSpec, layer: int) -> _Layer:
    """The layer as the model itself runs it."""
    run, spec = f"run_{layer}", model.ffns[layer]
    assert isinstance(spec, TreeSpec)
    infos: Any
    sown: Any
    (_, infos), sown = Transformer(model).apply(variables, rows_BC[:, :-1], mutable=["intermediates"])
    (x_BCE,), (tokens_BC,) = (sown["intermediates"][run]["ffn"][name] for name in ("x", "tokens"))
    params = jax.tree.map(
        lambda leaf: leaf[0], {**variables["params"][run]["ffn"], **variables["routing"][run]["ffn"]}
    )
    x_TE = x_BCE[0].reshape(-1, model.width)
    h_TPU, _ = masked.everywhere(params, x_TE, spec, tokens_BC[0].reshape(-1))
    beside_TE = finish(params, x_TE, jnp.zeros_like(x_TE), spec)
    return _Layer(h_TPU, params["w_out"].astype(jnp.float32), beside_TE, infos[layer].leaf_TP[0])


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _round(variables, rows_BC, here: _Layer, leaf_TP, *, model: ModelSpec, layer: int):
    """Loss before and after a round of moves, and the new leaves."""
    spec = model.ffns[layer]
    assert isinstance(spec, TreeSpec)
    outputs = layout_of(spec).outputs
    n_units = outputs.unit_starts[-1]
    path_JA = path_of_leaves(jnp.arange(n_units), outputs)

    def output(leaf_TP):
        on_path_TPU = jax.nn.one_hot(path_JA[leaf_TP], n_units, dtype=jnp.float32).sum(axis=-2)
        return here.beside_TE + jnp.einsum("tpu,pue->te", here.h_TPU * on_path_TPU, here.w_out_PUE)

    loss = functools.partial(_loss, variables, rows_BC, model=model, layer=layer)
    before, g_TE = jax.value_and_grad(loss)(output(leaf_TP).astype(jnp.float32))
    worth_TPU = here.h_TPU * jnp.einsum("te,pue->tpu", g_TE, here.w_out_PUE)
    path_TPJ = functools.reduce(jnp.add, (worth_TPU[..., units_J] for units_J in path_JA.T))
    own_TP = jnp.take_along_axis(path_TPJ, leaf_TP[..., None], axis=-1)[..., 0]
    gain_TP, best_TP = own_TP - path_TPJ.min(axis=-1), path_TPJ.argmin(axis=-1)
    gain_T, tree_T = gain_TP.max(axis=-1), gain_TP.argmax(axis=-1)
    is_moved_TP = jnp.arange(gain_TP.shape[1])[None] == tree_T[:, None]

    def tried(share):
        bar = jnp.quantile(gain_T, 1 - share)
        moves_T = jnp.where(share > 0, gain_T >= bar, False)
        new_TP = jnp.where(is_moved_TP & moves_T[:, None], best_TP, leaf_TP)
        return loss(output(new_TP)), new_TP

    losses_S, leaf_STP = jax.lax.map(tried, jnp.asarray(SHARES))
    best = jnp.argmin(losses_S)
    n_tokens = rows_BC.shape[0] * (rows_BC.shape[1] - 1)
    return before / n_tokens, losses_S[best] / n_tokens, leaf_STP[best]


def _loss(variables, rows_BC, y_TE, *, model: ModelSpec, layer: int):
    """Summed cross-entropy of the model, one of whose feed-forward layers gives y."""

    def put(next_fun, args, kwargs, context):
        found = next_fun(*args, **kwargs)
        if isinstance(context.module, FFN) and f"run_{layer}" in context.module.path:
            y, info = found
            return y_TE.astype(y.dtype).reshape(y.shape), info
        return found

    with nn.intercept_methods(put):
        logits_BCR, _ = padded_logits(model, variables, rows_BC[:, :-1])
    nll_BC = token_losses(logits_BCR, rows_BC[:, 1:])
    return nll_BC.sum()
