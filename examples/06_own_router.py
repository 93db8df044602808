"""A router of one's own, as one entry of a table: every implementation, config and program knows it then.

Experts that do not compete for a token: log p = log sigmoid, each for itself (DeepSeek-V3, arXiv 2412.19437).

    python examples/06_own_router.py
"""

import jax
import jax.numpy as jnp
import optax

from tree_ffn import FFN, LeafSpec
from tree_ffn.tree.leaf.routers import ROUTERS, Router, flat

WIDTH, STEPS = 64, 60

ROUTERS["sigmoid"] = Router(
    flat(lambda logits_TX, n_experts: jax.nn.log_sigmoid(logits_TX)),
    rows=lambda n_experts, n_trees: n_experts,
)


def main():
    spec = LeafSpec(n_experts=64, expert_width=4, top_k=4, router="sigmoid", gate_norm="rms", dense_start=0.2)
    layer, x = FFN(spec), jax.random.normal(jax.random.key(0), (256, WIDTH))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def train_step(params, state, step):
        def loss(params):
            y, _ = layer.apply({"params": params}, x, done=step / STEPS)
            return jnp.square(y - x[:, ::-1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(optimizer.init)(params), []
    for step in range(STEPS):
        params, state, value = train_step(params, state, jnp.float32(step))
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the router has {spec.router_rows} rows")
    return losses


if __name__ == "__main__":
    main()
