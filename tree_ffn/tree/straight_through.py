"""Straight-through decisions: a hard path forward, and backward what turning would have gained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree import gates, routing
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.on_path import onto_path, weighted
from tree_ffn.tree.spec import TreeSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def straight_through(z_TPU, r_TPR, leaf_TP, leak, spec: TreeSpec):
    """The hard path's units, and what leaks; backward also gives decisions their surrogate gradient.

    With the gradient dh of every unit, a node is worth v[n] = sum_u dh[n, u] act(z[n, u])
    and the hard path from it V[n] = v[n] + V[child]; then, at every visited node,

        dr[n] = beta s'(beta r[n]) (V[right] - V[left]),   s the logistic function,

    times 1 - leak: so much more a unit adds on the path than off it.
    """
    del r_TPR
    return weighted(gates.unit_activation(spec)(z_TPU), leaf_TP, leak, spec)


def _straight_through_fwd(z_TPU, r_TPR, leaf_TP, leak, spec):
    return straight_through(z_TPU, r_TPR, leaf_TP, leak, spec), (z_TPU, r_TPR, leaf_TP, leak)


def _straight_through_bwd(spec, saved, dh_TPU):
    z_TPU, r_TPR, leaf_TP, leak = saved
    units, vjp = jax.vjp(gates.unit_activation(spec), z_TPU)
    worth_TPN = _node_sums(dh_TPU * units, spec)
    dr_TPD = _decision_gradients(worth_TPN, r_TPR, leaf_TP, spec)
    if leak is not None:
        dr_TPD = (1 - leak) * dr_TPD
    dr_TPR = onto_path(dr_TPD, leaf_TP, spec.shape.depth)
    (dz_TPU,) = vjp(weighted(dh_TPU, leaf_TP, leak, spec))
    return dz_TPU, dr_TPR, None, None


def _node_sums(value_TPU, spec: TreeSpec):
    """Sums over the units of every node: [T, P, nodes of all levels], heap order."""
    if set(spec.output_widths) == {1}:
        return value_TPU
    levels, starts = [], layout_of(spec).outputs.unit_starts
    for level, width in enumerate(spec.output_widths):
        run = value_TPU[..., starts[level] : starts[level + 1]]
        levels.append(run.reshape(*run.shape[:-1], 2**level, width).sum(axis=-1))
    return jnp.concatenate(levels, axis=-1)


def _decision_gradients(worth_TPN, r_TPR, leaf_TP, spec: TreeSpec):
    """dr of the D decisions on the path: [T, P, D].

    Hashed decisions have none. V of the child taken is a sum along the path. V of the one refused is a
    walk down from it; the walks from all levels go on together, a level at a time, so that of all nodes
    only D (D + 1) / 2 are read.
    """
    depth = spec.shape.depth
    starts_L = 2 ** np.arange(depth + 1, dtype=np.int32) - 1
    path_TPL = leaf_TP[..., None] >> np.arange(depth, -1, -1, dtype=np.int32)[None, None]
    worth_TPL = _take(worth_TPN, path_TPL + starts_L[None, None])
    taken_TPD = jnp.flip(jnp.cumsum(jnp.flip(worth_TPL, axis=-1), axis=-1), axis=-1)[..., 1:]
    node_TPK, refused_TPK = path_TPL[..., :0], worth_TPL[..., :0]
    for level in range(1, depth + 1):
        right_TPK = (_take(r_TPR, starts_L[level - 1] + node_TPK) > 0).astype(jnp.int32)
        sibling_TP1 = path_TPL[..., level : level + 1] ^ 1
        node_TPK = jnp.concatenate([2 * node_TPK + right_TPK, sibling_TP1], axis=-1)
        worth_TPK = _take(worth_TPN, starts_L[level] + node_TPK)
        refused_TPK = jnp.pad(refused_TPK, ((0, 0), (0, 0), (0, 1))) + worth_TPK
    slope_TPD = routing.surrogate_slope(_take(r_TPR, (path_TPL + starts_L[None, None])[..., :-1]), spec.beta)
    sign_TPD = (2 * (path_TPL[..., 1:] & 1) - 1).astype(jnp.float32)
    is_router_D = np.arange(depth) >= spec.hash_levels
    return jnp.where(is_router_D, slope_TPD * sign_TPD * (taken_TPD - refused_TPK), 0.0)


def _take(value_TPN, node_TPK):
    return jnp.take_along_axis(value_TPN, node_TPK, axis=-1, mode="promise_in_bounds")


straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
