"""Around an optimizer: steps that are skipped, and float32 weights beside those stored in 16 bits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Steps over which mean and standard deviation are taken.
WINDOW = 128


class SkipState(NamedTuple):
    """State of `skipping`.

    Attributes:
      inner: of the optimizer within.
      window: float32 [2, WINDOW], losses and gradient norms of the last steps that were made.
      made: int32, steps that were made.
      skipped: int32, steps that were not.
      in_a_row: int32, the last of them.
    """

    inner: optax.OptState
    window: jax.Array
    made: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def skipping(inner: optax.GradientTransformation, above: float) -> optax.GradientTransformationExtraArgs:
    """The optimizer, but that a step in which something goes wrong changes neither weights nor moments.

    With the last 128 losses and gradient norms x_1, ..., x_n, n = 128, a step with x is left out unless

        x <= mean(x_i) + above * std(x_i),

    of both; and before 128 steps are made, or after, unless loss, gradient and update are finite.

    Source: `skip_step_on_spikes` of MaxText, which takes 128 steps and 6 standard deviations.

    Args:
      inner: an optimizer.
      above: standard deviations.

    Returns:
      a transformation whose `update` takes the loss too: `update(grads, state, params, loss=loss)`.
    """

    def init(params):
        zero = jnp.int32(0)
        return SkipState(inner.init(params), jnp.zeros((2, WINDOW), jnp.float32), zero, zero, zero)

    def update(grads, state, params=None, *, loss):
        found = jnp.stack([loss, optax.tree.norm(grads)]).astype(jnp.float32)
        limit = state.window.mean(axis=1) + above * state.window.std(axis=1)
        updates, new = inner.update(grads, state.inner, params)
        is_finite = jnp.isfinite(found).all() & jnp.isfinite(optax.tree.norm(updates))
        makes = is_finite & ((state.made < WINDOW) | (found <= limit).all())
        either = lambda one, other: jax.tree.map(lambda a, b: jnp.where(makes, a, b), one, other)
        window = state.window.at[:, state.made % WINDOW].set(found)
        made = SkipState(new, window, state.made + 1, state.skipped, jnp.int32(0))
        skipped = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        return either(updates, jax.tree.map(jnp.zeros_like, updates)), either(made, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


class MasterState(NamedTuple):
    """State of `with_master`: float32 weights, and that of the optimizer within."""

    master: optax.Params
    inner: optax.OptState


def with_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 weights of its own; weights in 16 bits are these, rounded.

    In bfloat16 a weight of 1 stays 1 at any update below 2^-8; here the small ones add up.

    Source: Micikevicius et al. 2018, Mixed Precision Training (arXiv 1710.03740).
    """
    full = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params):
        master = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)  # donated beside `params`
        return MasterState(master, inner.init(master))

    def update(grads, state, params):
        updates, new = inner.update(full(grads), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        rounded = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), master, params)
        # The difference of two numbers of 16 bits, in float32: what is added to the one gives the other.
        return jax.tree.map(jnp.subtract, full(rounded), full(params)), MasterState(master, new)

    return optax.GradientTransformation(init, update)
