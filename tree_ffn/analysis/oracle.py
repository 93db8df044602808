"""What better decisions would be worth: leaves moved to where the loss itself is lower, a layer at a time.

The layer's input, and so what every unit would do, stays as it is; only leaves move. With g[t] the gradient
of the summed loss by the layer's output for token t, a path is to first order worth

    v[t, p, j] = sum_{units u on path j of tree p} act(z[t, p, u]) <w_out[p, u], g[t]>

In a round a token may move in one tree, that where its v falls most. Tokens are sorted by that fall, and the
first of them move: all, a half, a quarter, ... or none, whichever gives the lowest loss. So the loss never
rises, and what is found is less than what the best leaves would give.

The loss knows the next token and no router does: it falls even where no decision was wrong. It bounds what
routing can lose, and does not say what it loses; a model whose decisions are random says how to read it.
"""

import functools
from typing import Any, NamedTuple, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.conversion.targets import path_units
from tree_ffn.errors import InputError, check_metric, check_positive_int
from tree_ffn.models.ffn import FFN
from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.models.transformer import Transformer, unrolled
from tree_ffn.training.losses import next_token_loss
from tree_ffn.training.probe import can_probe
from tree_ffn.tree import TreeSpec
from tree_ffn.tree.products import pre_activations

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
      h_TPU: act(z) of every unit, on the path or not.
      w_out_PUE, b_out_E: its weights.
      leaf_TP: where tokens go.
    """

    h_TPU: jax.Array
    w_out_PUE: jax.Array
    b_out_E: jax.Array
    leaf_TP: jax.Array


def can_move(ffn: FFNSpec) -> TypeGuard[TreeSpec]:
    """Whether a layer is of whole trees whose units add up as they are."""
    return can_probe(ffn) and ffn.act_site == "node"


def better_leaves(model: ModelSpec, variables: dict, rows_BC: jax.Array, layer: int, rounds: int) -> Oracle:
    """Moves the leaves of one layer of trees to where the loss is lower.

    Args:
      model: a trained model.
      variables: its {"params", "routing"}.
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
    model, variables = unrolled(model.after_start, variables)
    here = _seen(variables, rows_BC, model=model, layer=layer)
    leaf_TP, losses = here.leaf_TP, []
    for _ in range(rounds):
        before, after, leaf_TP = _round(variables, rows_BC, here, leaf_TP, model=model, layer=layer)
        losses = [*(losses or [float(before)]), float(after)]
        check_metric(f"loss with moved leaves of layer {layer}", sum(losses))
    return Oracle(tuple(losses), float(jnp.mean(leaf_TP != here.leaf_TP)))


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _seen(variables, rows_BC, *, model: ModelSpec, layer: int) -> _Layer:
    """The layer as the model itself runs it."""
    run, spec = f"run_{layer}", model.ffns[layer]
    assert isinstance(spec, TreeSpec)
    infos: Any
    sown: Any
    (_, infos), sown = Transformer(model).apply(variables, rows_BC[:, :-1], mutable=["intermediates"])
    (x_BCE,) = sown["intermediates"][run]["ffn"]["x"]
    params = jax.tree.map(lambda leaf: leaf[0], variables["params"][run]["ffn"])
    x_TE = x_BCE[0].reshape(-1, model.width)
    h_TPU = spec.act(pre_activations(x_TE, params["w_in"], params["b_in"]))
    w_out_PUE, b_out_E = (params[name].astype(jnp.float32) for name in ("w_out", "b_out"))
    return _Layer(h_TPU, w_out_PUE, b_out_E, infos[layer].leaf_TP[0])


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _round(variables, rows_BC, here: _Layer, leaf_TP, *, model: ModelSpec, layer: int):
    """Loss before and after a round of moves, and the new leaves."""
    spec = model.ffns[layer]
    assert isinstance(spec, TreeSpec)
    path_JA = path_units(spec.shape)

    def output(leaf_TP):
        on_path_TF = spec.unit_gates({}, leaf_TP, jnp.ones(leaf_TP.shape, jnp.float32))
        h_TPU = here.h_TPU * on_path_TF.reshape(here.h_TPU.shape)
        return here.b_out_E[None] + jnp.einsum("tpu,pue->te", h_TPU, here.w_out_PUE)

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
        nll, nll_BC, _ = next_token_loss(model, variables, rows_BC)
    return nll * nll_BC.size
