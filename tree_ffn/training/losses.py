"""Cross-entropy of the next token."""

import jax
import jax.numpy as jnp

from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Transformer, output_of
from tree_ffn.training.chunks import summed
from tree_ffn.tree import Info


@jax.custom_vjp
def token_losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """Cross-entropy of every target, in nats: float32 [B, C].

        nll = logsumexp(logits) - logits[target]
        d logits = (softmax(logits) - onehot(target)) d nll

    The derivative is one elementwise expression of the logits: the derivative of picking
    the target out would write and read zeros of their size.

    Args:
      logits_BCV: float32 scores.
      targets_BC: int32 tokens to predict, below V.

    Example:
      >>> nll_BC = token_losses(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32))
      >>> round(float(nll_BC[0, 0]), 4)
      1.3863
    """
    return _forward(logits_BCV, targets_BC)[0]


def _forward(logits_BCV, targets_BC):
    total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    return total_BC - target_BC, (logits_BCV, targets_BC, total_BC)


def _backward(saved, d_nll_BC):
    logits_BCV, targets_BC, total_BC = saved
    token_BCV = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, logits_BCV.ndim - 1)
    softmax_BCV = jnp.exp(logits_BCV - total_BC[..., None])
    target_BCV = jnp.where(token_BCV == targets_BC[..., None], d_nll_BC[..., None], 0.0)
    return softmax_BCV * d_nll_BC[..., None] - target_BCV, None


token_losses.defvjp(_forward, _backward)


def row_mean(value_BC: jax.Array, counted_BC: jax.Array | None = None, n_rows: jax.Array | None = None):
    """Mean over the targets that count of each row, then over rows.

    Args:
      value_BC: one number a target.
      counted_BC: bool, which targets count; all by default.
      n_rows: int32 scalar, how many rows count; the others only fill up the batch. All by default.

    Example:
      >>> float(row_mean(jnp.array([[1.0, 3.0], [9.0, 9.0]]), n_rows=jnp.int32(1)))
      2.0
    """
    if counted_BC is None:
        value_B = value_BC.mean(axis=1)
    else:
        weight_BC = counted_BC.astype(value_BC.dtype)
        value_B = (value_BC * weight_BC).sum(axis=1) / jnp.maximum(weight_BC.sum(axis=1), 1.0)
    if n_rows is None:
        return value_B.mean()
    counts_B = jnp.arange(len(value_B)) < n_rows
    return jnp.where(counts_B, value_B, 0.0).sum() / n_rows.astype(value_B.dtype)


def row_weights(counted_BC: jax.Array) -> jax.Array:
    """Weights [B, C] by which values add up to their `row_mean`.

    Args:
      counted_BC: bool, which targets count.

    Example:
      >>> row_weights(jnp.array([[True, True], [True, False]])).tolist()
      [[0.25, 0.25], [0.5, 0.0]]
    """
    weight_BC = counted_BC.astype(jnp.float32)
    n_counted_B1 = jnp.maximum(weight_BC.sum(axis=1, keepdims=True), 1.0)
    return weight_BC / (n_counted_B1 * len(weight_BC))


def next_token_loss(
    model: ModelSpec, variables: dict, batch: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[Info, ...]]:
    """Mean cross-entropy in nats a token, that of every target [B, C], and the infos of the layers.

    Only the mean has a gradient: it is computed along with it, chunk by chunk (see `chunks`).

    Args:
      model: the model.
      variables: {"params", "routing"}.
      batch: int32 [B, C + 1].
    """
    infos: tuple[Info, ...]
    x_BCE, infos = Transformer(model).apply(variables, batch[:, :-1], states=True)
    targets_BC, params = batch[:, 1:], variables["params"]
    given = targets_BC, jnp.full(targets_BC.shape, 1 / targets_BC.size, jnp.float32)
    loss, nll_BC = summed(_weighed, model, *output_of(model, params, x_BCE), given)
    return loss, nll_BC, infos


def _weighed(logits_BCV, given, fixed):
    del fixed
    targets_BC, weight_BC = given
    nll_BC = token_losses(logits_BCV, targets_BC)
    return (nll_BC * weight_BC).sum(), nll_BC
