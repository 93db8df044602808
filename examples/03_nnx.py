"""The recommended layer in a Flax NNX model: the Linen module through Flax's own bridge.

python examples/03_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tree_ffn import FFN, recipe

WIDTH, STEPS = 128, 60


class Block(nnx.Module):
    """y = x + FFN(norm(x))."""

    def __init__(self, x, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        layer = FFN(recipe(WIDTH), w_in_scale=0.7, w_out_scale=0.2)
        self.ffn = nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(x)

    def __call__(self, x, done=None):
        y, info = self.ffn(self.norm(x), done=done)
        return x + y


def main():
    x = jax.random.normal(jax.random.key(0), (8, 32, WIDTH))
    block = nnx.jit(lambda: Block(x, nnx.Rngs(1)))()
    optimizer = nnx.Optimizer(block, optax.adamw(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(block, optimizer, step):
        def loss(block):
            return jnp.square(block(x, done=step / STEPS) - x[..., ::-1]).mean()

        value, grads = nnx.value_and_grad(loss)(block)
        optimizer.update(block, grads)
        return value

    losses = [float(train_step(block, optimizer, jnp.float32(step))) for step in range(STEPS)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
