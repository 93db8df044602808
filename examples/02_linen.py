"""The recommended layer in a Flax Linen block, and the training step that its dense start needs.

python examples/02_linen.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tree_ffn import FFN, recipe

WIDTH, STEPS = 128, 60


class Block(nn.Module):
    """y = x + FFN(norm(x)): an MLP of 512 units, 16 of them active for a token."""

    @nn.compact
    def __call__(self, x, done=None):
        layer = FFN(recipe(WIDTH), w_in_scale=0.7, w_out_scale=0.2)
        y, info = layer(nn.LayerNorm()(x), done=done)  # info.leaf_TP: the experts of each token
        return x + y


def main():
    block, x = Block(), jax.random.normal(jax.random.key(0), (8, 32, WIDTH))
    params = jax.jit(block.init)(jax.random.key(1), x)["params"]
    optimizer = optax.adamw(3e-3)

    @jax.jit
    def train_step(params, state, step):
        def loss(params):  # learns to turn every token around
            y = block.apply({"params": params}, x, done=step / STEPS)  # which share of the training is over
            return jnp.square(y - x[..., ::-1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(optimizer.init)(params), []
    for step in range(STEPS):
        params, state, value = train_step(params, state, jnp.float32(step))
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    y = jax.jit(block.apply)({"params": params}, x)  # inference: no `done`, 16 experts a token
    print(f"inference {float(jnp.square(y - x[..., ::-1]).mean()):.3f}")
    return losses


if __name__ == "__main__":
    main()
