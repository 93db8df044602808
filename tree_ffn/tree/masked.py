"""Masked execution: every unit is computed, then all but the path is masked.

Two plain matrix products over the P * U units of all trees, and one for silent
routers. It costs as much as the dense layer, is the reference of the other
executions, trains every routing, and is meant for training many narrow trees on
an accelerator.

What is not a matrix product is elementwise: a unit is visited where its node is
the ancestor, at its level, of the token's leaf, which one shift and one
comparison per unit say. No level is sliced out of the units' activations or put
back, and of continuous routing's logits only those of the path are kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree import gates, routing
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.products import pre_activations
from tree_ffn.tree.spec import TreeSpec


def trees(
    params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None, leak: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out.

        s[t] = sum_p sum_n visited[t, p, n] g[t, p, n] sum_u act(z[t, p, n, u]) w_out[p, n, u]

    With a leak, units off the path are not left out, and no gate is shut: visited g is then
    leak + (1 - leak) visited g.

    Args:
      params: {w_in [P,U,E], b_in [P,U], w_out [P,U,E] (without silent routers), threshold [P,N]} and,
        under router `frozen`, {router: {w [P,R,E]}}; with `hash_levels`, {salt [P]}.
      x_TE: tokens, float32 or bfloat16.
      spec: the layer.
      token_T: int32 ids of the tokens, which `hash_levels` read.
      leak: float32 scalar (`Leaking.leak_at`); None is 0.

    Returns:
      s_TE in x's dtype, leaf_TP int32.
    """
    h_TPU, leaf_TP = hidden(params, x_TE, spec, token_T, leak)
    w_out_FE = params["w_out"].astype(x_TE.dtype).reshape(-1, x_TE.shape[1])
    s_TE = h_TPU.astype(x_TE.dtype).reshape(x_TE.shape[0], -1) @ w_out_FE
    return s_TE, leaf_TP


def hidden(
    params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None, leak: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What units add to the sum before w_out: visited g * act(z), of which `trees` says what a leak makes.

    Args:
      params, x_TE, spec, token_T, leak: as `trees` takes them.

    Returns:
      h_TPU float32, a column for each row of w_out; leaf_TP int32.
    """
    z_TPU, r_TPR, leaf_TP = _decided(params, x_TE, spec, token_T)
    r = _along_path(r_TPR, leaf_TP, spec.shape.depth) if spec.routing == "continuous" else r_TPR
    # Recomputed in the backward pass: to store what its derivative needs costs more than to compute it again.
    path_units = jax.checkpoint(_path_units, static_argnums=(3,), prevent_cse=False)
    return path_units(z_TPU, r, leaf_TP, spec, leak), leaf_TP


def everywhere(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None) -> tuple[jax.Array, jax.Array]:
    """What every unit would add to the sum before w_out if a token's path led there: g act(z).

    The gate is that which the token's own path has at the unit's level: what is asked is where else the
    token might have gone, not how sure it was.

    Args:
      params, x_TE, spec, token_T: as `trees` takes them.

    Returns:
      h_TPU float32, a column for each row of w_out; leaf_TP int32, the tokens' own.
    """
    z_TPU, r_TPR, leaf_TP = _decided(params, x_TE, spec, token_T)
    h_TPU = gates.unit_activation(spec)(z_TPU)
    if spec.routing == "continuous":
        r_TPD = _along_path(r_TPR, leaf_TP, spec.shape.depth)
        h_TPU = _gates_of_units(r_TPD, leaf_TP, spec) * h_TPU
    return h_TPU, leaf_TP


def _decided(params, x_TE, spec: TreeSpec, token_T):
    """Pre-activations of the units with rows in w_out [T, P, U], decision logits [T, P, R], leaves [T, P].

    Frozen routers' logits are None. Silent routers have a product of their own: to take weights apart costs
    little, to take activations apart much.
    """
    w_PUE, b_PU, layout = params["w_in"], params["b_in"], layout_of(spec)
    if spec.router == "silent":
        z_TPU = pre_activations(x_TE, _without_silent(w_PUE, spec), _without_silent(b_PU, spec))
        r_TPR = routing.logits_of(params, x_TE, spec)
    else:
        z_TPU = pre_activations(x_TE, w_PUE, b_PU)
        if spec.router == "frozen":
            return z_TPU, None, routing.leaves(params, x_TE, spec, token_T)
        r_TPR = routing.above_threshold(layout.first_units(z_TPU, axis=2), params, layout)
    logits = functools.partial(_logits_at, jax.lax.stop_gradient(r_TPR))
    right_TPH = routing.hashed_sides(params, spec, token_T)
    return z_TPU, r_TPR, routing.walk(logits, layout, x_TE.shape[0], right_TPH)


def _without_silent(w_PU, spec: TreeSpec):
    """Of weights [P, all units, ...], those of the units that add to the output: [P, rows of w_out, ...]."""
    shape, runs = spec.shape, []
    for level, (width, n_out) in enumerate(zip(shape.widths, spec.output_widths)):
        run = w_PU[:, shape.level_starts[level] : shape.level_starts[level + 1]]
        nodes = run.reshape(run.shape[0], 2**level, width, *run.shape[2:])[:, :, width - n_out :]
        runs.append(nodes.reshape(run.shape[0], -1, *run.shape[2:]))
    return jnp.concatenate(runs, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _along_path(r_TPR, leaf_TP, depth: int):
    """Decision logits of the nodes above each leaf, root first: [T, P, D].

    Backward the path is found anew from its leaf, so that nothing of R entries is kept.
    """
    levels = [_logits_at(r_TPR, level, leaf_TP >> (depth - level))[..., None] for level in range(depth)]
    return jnp.concatenate([r_TPR[..., :0], *levels], axis=-1)


def _logits_at(r_TPR, level: int, place_TP):
    """Logits of one node of a level for every token and tree: [T, P]."""
    r_TPJ = r_TPR[..., 2**level - 1 : 2 ** (level + 1) - 1]
    # A masked sum, not a gather: the logits were just computed, and a GPU reads them in order faster.
    return jnp.where(_is_node(place_TP, level), r_TPJ, 0.0).sum(axis=-1)


def _along_path_fwd(r_TPR, leaf_TP, depth):
    return _along_path(r_TPR, leaf_TP, depth), leaf_TP


def _along_path_bwd(depth, leaf_TP, dr_TPD):
    return _onto_path(dr_TPD, leaf_TP, depth), None


_along_path.defvjp(_along_path_fwd, _along_path_bwd)


def _onto_path(value_TPD, leaf_TP, depth: int):
    """Values of the nodes above each leaf, put where these nodes are; elsewhere 0: [T, P, R]."""
    levels = [
        jnp.where(_is_node(leaf_TP >> (depth - level), level), value_TPD[..., level, None], 0.0)
        for level in range(depth)
    ]
    return jnp.concatenate([value_TPD[..., :0], *levels], axis=-1)


def _path_units(z_TPU, r, leaf_TP, spec: TreeSpec, leak) -> jax.Array:
    """g * act(z) of the units on the path; elsewhere 0 (also where a unit is not finite), or what leaks.

    Of decision logits, straight-through routing needs all, r [T, P, R], continuous the path's, r [T, P, D].
    """
    if spec.routing == "straight_through":
        return _straight_through(z_TPU, r, leaf_TP, leak, spec)
    units = gates.unit_activation(spec)(z_TPU)
    gates_TPU = _gates_of_units(r, leaf_TP, spec) if spec.routing == "continuous" else None
    return _weighted(units, leaf_TP, leak, spec, gates_TPU)


def _weighted(units_TPU, leaf_TP, leak, spec: TreeSpec, gates_TPU=None):
    """Units on the path times their gates, 1 where none are given; elsewhere 0, or the share `leak` of them.

    With a leak gates are leak + (1 - leak) g.
    """
    levels, nodes = _unit_tables(spec)
    visited_TPU = (leaf_TP[..., None] >> (spec.shape.depth - levels)[None, None]) == nodes[None, None]
    on_path = units_TPU if gates_TPU is None else gates_TPU * units_TPU
    if leak is None:
        return jnp.where(visited_TPU, on_path, 0.0)
    off_path = leak * units_TPU
    if gates_TPU is not None:
        on_path = off_path + (1 - leak) * on_path
    return jnp.where(visited_TPU, on_path, off_path)


def _is_node(place_TP, level: int):
    """bool [T, P, 2^l]: which node of a level is it?"""
    return place_TP[..., None] == np.arange(2**level, dtype=np.int32)[None, None]


def _unit_tables(spec: TreeSpec):
    """Level of every unit, and its node's place within the level: int32 [U] each."""
    widths = list(enumerate(spec.output_widths))
    levels = [np.full(2**level * width, level) for level, width in widths]
    nodes = [np.repeat(np.arange(2**level), width) for level, width in widths]
    return np.concatenate(levels).astype(np.int32), np.concatenate(nodes).astype(np.int32)


def _gates_of_units(r_TPD, leaf_TP, spec: TreeSpec):
    """Gate of every unit's level on the token's own path: float32 [T, P, U]."""
    gate = jnp.ones(leaf_TP.shape, jnp.float32)
    runs = []
    for level, width in enumerate(spec.output_widths):
        runs.append(jnp.broadcast_to(gate[..., None], (*gate.shape, 2**level * width)))
        if spec.hash_levels <= level < spec.shape.depth:
            right_TP = layout_of(spec).goes_right(level, leaf_TP)
            gate = gates.child_gate(gate, gates.towards(r_TPD[..., level], right_TP, spec), spec)
    gates_TPU = jnp.concatenate(runs, axis=-1)
    return gates_TPU / gates.gate_norm(gate, spec.gate_norm)[..., None] if spec.renormalise else gates_TPU


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _straight_through(z_TPU, r_TPR, leaf_TP, leak, spec: TreeSpec):
    """The hard path's units, and what leaks; backward also gives decisions their surrogate gradient.

    With the gradient dh of every unit, a node is worth v[n] = sum_u dh[n, u] act(z[n, u])
    and the hard path from it V[n] = v[n] + V[child]; then, at every visited node,

        dr[n] = beta s'(beta r[n]) (V[right] - V[left]),   s the logistic function,

    times 1 - leak: so much more a unit adds on the path than off it.
    """
    del r_TPR
    return _weighted(gates.unit_activation(spec)(z_TPU), leaf_TP, leak, spec)


def _straight_through_fwd(z_TPU, r_TPR, leaf_TP, leak, spec):
    return _straight_through(z_TPU, r_TPR, leaf_TP, leak, spec), (z_TPU, r_TPR, leaf_TP, leak)


def _straight_through_bwd(spec, saved, dh_TPU):
    z_TPU, r_TPR, leaf_TP, leak = saved
    units, vjp = jax.vjp(gates.unit_activation(spec), z_TPU)
    worth_TPN = _node_sums(dh_TPU * units, spec)
    dr_TPD = _decision_gradients(worth_TPN, r_TPR, leaf_TP, spec)
    if leak is not None:
        dr_TPD = (1 - leak) * dr_TPD
    dr_TPR = _onto_path(dr_TPD, leaf_TP, spec.shape.depth)
    (dz_TPU,) = vjp(_weighted(dh_TPU, leaf_TP, leak, spec))
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


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
