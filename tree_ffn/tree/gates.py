"""What units of a path add: their activations, times the gates of the decisions that led there.

Under continuous routing every node has a gate in [0, 1], made of the openness of
the decisions above it; under the other routings all gates are 1.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.activations import absolute, activation
from tree_ffn.tree.spec import TreeSpec


def child_gate(gate: jax.Array, r: jax.Array, spec: TreeSpec) -> jax.Array:
    """Gate of a node's children: g[0] = 1, g[l+1] = min(g[l], c(|r[l]|)), or the product.

    c(a) = 1 - exp(-kappa a) vanishes where the decision flips, so the output is
    a continuous function of the input although the path is hard. At equal gates
    the one nearest the root keeps the gradient; d|r|/dr is 0 at r = 0.

    Args:
      gate: the node's own gate, any shape.
      r: its decision logit, the same shape; with a beam, `towards` the child.
      spec: `routing`, `gate` and `kappa` are read; other routings keep the gate.
    """
    if spec.routing != "continuous":
        return gate
    return narrow_gate(gate, openness(r, spec), spec)


def openness(r: jax.Array, spec: TreeSpec) -> jax.Array:
    """c(|r|): how far a decision is from flipping, up to 1: 1 - exp(-kappa |r|), or the logistic function.

    With a beam it is c(r): a token may take the less likely side.
    """
    if spec.beam > 1:
        return jax.nn.sigmoid(spec.kappa * r)
    if spec.openness == "logistic":
        return jax.nn.sigmoid(spec.kappa * absolute(r))
    return -jnp.expm1(-spec.kappa * absolute(r))


def towards(r: jax.Array, right: jax.Array, spec: TreeSpec) -> jax.Array:
    """What `openness` takes: r itself; with a beam r where a path goes right, and -r where it goes left."""
    return r if spec.beam == 1 else jnp.where(right, r, -r)


def narrow_gate(gate: jax.Array, own: jax.Array, spec: TreeSpec) -> jax.Array:
    """The gate below a decision of openness `own`: the minimum of the two, or their product."""
    return gate * own if spec.gate == "product" else jnp.where(own < gate, own, gate)


def unit_activation(spec: TreeSpec):
    """What a unit's pre-activation becomes: act at site `node`, itself at site `sum`."""
    if spec.act_site == "sum":
        return lambda z: z
    return activation(spec.activation)


def hidden_on_path(
    z: jax.Array, threshold: jax.Array, spec: TreeSpec, right: jax.Array | None = None
) -> jax.Array:
    """Weights of a path's units in the output: g[l] * act(z[l, u]), without silent routers.

    Args:
      z: float32 [..., path units], pre-activations of the visited units, root first.
      threshold: [..., D] thresholds of the visited deciding nodes.
      spec: the layer.
      right: bool [..., D], where the path goes right; only a beam's gates need it.

    Returns:
      float32 [..., path units that have rows in w_out].
    """
    units, gated = unit_activation(spec)(z), spec.routing == "continuous" and spec.shape.depth > 0
    if not gated and spec.router != "silent":
        return units
    gates = _path_gates(z, threshold, spec, right) if gated else None
    runs = []
    for level, (end, width) in enumerate(zip(spec.shape.path_starts[1:], spec.output_widths)):
        run = units[..., end - width : end]
        runs.append(run if gates is None else gates[level][..., None] * run)
    return jnp.concatenate(runs, axis=-1)


def _path_gates(z: jax.Array, threshold: jax.Array, spec: TreeSpec, right) -> list[jax.Array]:
    """Gate of every level of a path; z, threshold and right as `hidden_on_path` takes them."""
    starts = spec.shape.path_starts[: spec.shape.depth]
    # One array for all decisions of the path: an exponential a level would be a kernel a level.
    first_units = jnp.concatenate([z[..., start : start + 1] for start in starts], axis=-1)
    open_D = openness(towards(first_units - threshold, right, spec), spec)
    gates = [jnp.ones_like(z[..., 0])]
    for level in range(spec.shape.depth):
        is_hashed = level < spec.hash_levels
        gates.append(gates[-1] if is_hashed else narrow_gate(gates[-1], open_D[..., level], spec))
    return gates


def gate_norm(gate: jax.Array, order: int) -> jax.Array:
    """Norm of gates, which are at least 0, over their last axis, which stays: float32 [..., 1], above 0.

    Of gates that are all 0, which only underflow makes, it is a number so small that 0 divided by it is 0.

    Args:
      gate: float32 [..., n].
      order: 1, their sum; or 2, the root of the sum of their squares.
    """
    least = 2 * jnp.finfo(gate.dtype).tiny  # its half is a number still
    if order == 1:
        return jnp.maximum(gate.sum(axis=-1, keepdims=True), least)
    # Over the largest first: squares underflow long before gates do. Their sum is then at least 1, or 0.
    largest = jnp.maximum(jax.lax.stop_gradient(gate.max(axis=-1, keepdims=True)), least)
    squares = jnp.square(gate / largest).sum(axis=-1, keepdims=True)
    return largest * jnp.sqrt(jnp.maximum(squares, 0.5))
