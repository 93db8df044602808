"""Masked execution: every unit is computed, then all but the path is masked.

Two plain matrix products over the P * U units of all trees. It costs as much
as the dense layer, is the reference of the other executions, trains every
routing, and is the fastest way to train many narrow trees on an accelerator.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree import routing
from tree_ffn.tree.spec import TreeSpec


def trees(params: dict, x_TE: jax.Array, spec: TreeSpec) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out.

        s[t] = sum_p sum_n visited[t, p, n] g[t, p, n] sum_u act(z[t, p, n, u]) w_out[p, n, u]

    Args:
      params: {w_in [P,U,E], b_in [P,U], w_out [P,U,E], threshold [P,N]} and,
        under router `frozen`, {router: {w [P,R,E]}}.
      x_TE: tokens, float32 or bfloat16.
      spec: the layer.

    Returns:
      s_TE in x's dtype, leaf_TP int32.
    """
    shape = spec.shape
    z_TPU = _project(x_TE, params["w_in"].astype(x_TE.dtype)) + params["b_in"].astype(jnp.float32)[None]
    r_levels = _level_logits(params, x_TE, z_TPU, spec)
    visited, gates = _walk_levels(r_levels, z_TPU.shape[:2], spec)
    act = routing.unit_activation(spec)
    hidden = []
    for level, width in enumerate(shape.widths):
        units = z_TPU[..., shape.level_starts[level] : shape.level_starts[level + 1]]
        units_TPJW = units.reshape(*z_TPU.shape[:2], 2**level, width)
        gated = act(units_TPJW)
        if spec.routing == "continuous":
            gated = gates[level][..., None] * gated
        kept = _keep_visited(visited[level], gated, spec)
        hidden.append(kept.astype(x_TE.dtype).reshape(units.shape))
    h_TPU = jnp.concatenate(hidden, axis=-1)
    s_TE = jnp.einsum("tpu,pue->te", h_TPU, params["w_out"].astype(x_TE.dtype))
    leaf_TP = jnp.argmax(visited[-1], axis=-1).astype(jnp.int32)
    return s_TE, leaf_TP


@jax.custom_vjp
def _project(x_TE: jax.Array, w_PUE: jax.Array) -> jax.Array:
    """z_TPU in float32 from operands of any dtype."""
    return jnp.einsum("te,pue->tpu", x_TE, w_PUE, preferred_element_type=jnp.float32)


def _project_fwd(x_TE, w_PUE):
    return _project(x_TE, w_PUE), (x_TE, w_PUE)


def _project_bwd(saved, dz_TPU):
    # Differentiating a bfloat16 product with a float32 result would run the two
    # backward products in float32; the operands' own dtype is enough.
    x_TE, w_PUE = saved
    dz_TPU = dz_TPU.astype(x_TE.dtype)
    return jnp.einsum("tpu,pue->te", dz_TPU, w_PUE), jnp.einsum("tpu,te->pue", dz_TPU, x_TE)


_project.defvjp(_project_fwd, _project_bwd)


def _level_logits(params, x_TE, z_TPU, spec) -> list[jax.Array]:
    """Decision logits of every deciding level: D arrays [T, P, 2^l]."""
    shape = spec.shape
    if spec.router == "frozen":
        r_TPR = routing.decision_logits(params, x_TE, spec)
        return [r_TPR[..., 2**level - 1 : 2 ** (level + 1) - 1] for level in range(shape.depth)]
    threshold_PN = jax.lax.stop_gradient(params["threshold"].astype(jnp.float32))
    logits = []
    for level in range(shape.depth):
        start, stop, width = shape.level_starts[level], shape.level_starts[level + 1], shape.widths[level]
        first_units = z_TPU[..., start:stop:width]
        logits.append(first_units - threshold_PN[None, :, 2**level - 1 : 2 ** (level + 1) - 1])
    return logits


def _walk_levels(r_levels, tokens_trees, spec):
    """Visits and gates of every node: L arrays [T, P, 2^l] each.

    Visits are boolean, but under straight-through routing products of surrogate
    steps, so that decisions get their gradient from them.
    """
    soft = spec.routing == "straight_through"
    visited = [jnp.ones((*tokens_trees, 1), jnp.float32 if soft else jnp.bool_)]
    gates = [jnp.ones((*tokens_trees, 1), jnp.float32)]
    for r in r_levels:
        here = visited[-1]
        if soft:
            right = routing.surrogate_step(r, spec.beta)
            left_visits, right_visits = here * (1 - right), here * right
        else:
            right = r > 0
            left_visits, right_visits = here & ~right, here & right
        visited.append(_interleave(left_visits, right_visits))
        gate = routing.child_gate(gates[-1], r, spec)
        gates.append(_interleave(gate, gate))
    return visited, gates


def _interleave(left_TPJ: jax.Array, right_TPJ: jax.Array) -> jax.Array:
    """Children in heap order: left, right, left, right, ..."""
    return jnp.stack([left_TPJ, right_TPJ], axis=-1).reshape(*left_TPJ.shape[:2], -1)


def _keep_visited(visited_TPJ, units_TPJW, spec):
    """Units of visited nodes, 0 elsewhere (also where an unvisited unit is not finite)."""
    if spec.routing == "straight_through":
        return _product_where_visited(visited_TPJ[..., None], units_TPJW)
    return jnp.where(visited_TPJ[..., None], units_TPJW, 0.0)


@jax.custom_jvp
def _product_where_visited(visited, units):
    """visited * units, exactly 0 where visited is 0; differentiable in both."""
    return jnp.where(visited > 0, units, 0.0)


@_product_where_visited.defjvp
def _product_where_visited_jvp(primals, tangents):
    (visited, units), (d_visited, d_units) = primals, tangents
    return _product_where_visited(visited, units), visited * d_units + units * d_visited
