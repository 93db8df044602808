"""The layer as a pure function of arrays, without Flax; weight decay for the matrices alone.

python examples/04_jax_and_optax.py
"""

import jax
import jax.numpy as jnp
import optax

from tree_ffn import leaf_ffn, recipe
from tree_ffn.tree.leaf import init_params

WIDTH, STEPS = 128, 60


def main():
    spec = recipe(WIDTH)
    x_TE = jax.random.normal(jax.random.key(0), (256, WIDTH))
    params = init_params(jax.random.key(1), spec, WIDTH, w_in_scale=0.7, w_out_scale=0.2)
    decays = {name: name.startswith("w_") for name in params}
    optimizer = optax.adamw(3e-3, weight_decay=0.1, mask=decays)

    @jax.jit
    def train_step(params, state, step):
        def loss(params):
            leak = spec.leak_at(step / STEPS)  # what experts that are not chosen add: 1 at first, later 0
            y_TE, info = leaf_ffn(params, x_TE, spec, leak=leak)
            return jnp.square(x_TE + y_TE - x_TE[:, ::-1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for step in range(STEPS):
        params, state, value = train_step(params, state, jnp.float32(step))
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
