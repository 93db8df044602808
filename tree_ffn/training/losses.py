"""Cross-entropy of the next token."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def token_losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target, in nats, and the logarithm of the softmax's denominator.

        nll = logsumexp(logits) - logits[target]
        d logits = softmax(logits) (d nll + d logsumexp) - onehot(target) d nll

    The derivative is one elementwise expression of the logits: the derivative of picking
    the target out would write and read zeros of their size.

    Args:
      logits_BCV: float32 scores.
      targets_BC: int32 tokens to predict, below V.

    Returns:
      (nll_BC, logsumexp_BC), float32.

    Example:
      >>> nll, total = token_losses(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32))
      >>> round(float(nll[0, 0]), 4), round(float(total[0, 0]), 4)
      (1.3863, 1.3863)
    """
    total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    return total_BC - target_BC, total_BC


def _forward(logits_BCV, targets_BC):
    nll_BC, total_BC = token_losses(logits_BCV, targets_BC)
    return (nll_BC, total_BC), (logits_BCV, targets_BC, total_BC)


def _backward(saved, gradients):
    (logits_BCV, targets_BC, total_BC), (d_nll_BC, d_total_BC) = saved, gradients
    token_BCV = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, logits_BCV.ndim - 1)
    softmax_BCV = jnp.exp(logits_BCV - total_BC[..., None])
    target_BCV = jnp.where(token_BCV == targets_BC[..., None], d_nll_BC[..., None], 0.0)
    return softmax_BCV * (d_nll_BC + d_total_BC)[..., None] - target_BCV, None


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


def next_token_loss(
    logits_BCV: jax.Array, targets_BC: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over all targets, in nats a token, and the same with the z-loss added.

        nll = logsumexp(logits) - logits[target],   z = z_loss logsumexp(logits)^2

    Args:
      logits_BCV: float32 logits.
      targets_BC: int32 tokens to predict.
      z_loss: weight of the z-loss; 0 is off.

    Source: z-loss, Chowdhery et al. 2022, PaLM (arXiv 2204.02311), section 5.
    """
    nll_BC, total_BC = token_losses(logits_BCV, targets_BC)
    nll = jnp.mean(nll_BC)
    return nll, nll + z_loss * jnp.mean(jnp.square(total_BC)) if z_loss else nll
