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

from tree_ffn.tree import gates, routing
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.on_path import along_path, logits_at, weighted
from tree_ffn.tree.products import pre_activations
from tree_ffn.tree.spec import TreeSpec
from tree_ffn.tree.straight_through import straight_through


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
    r = along_path(r_TPR, leaf_TP, spec.shape.depth) if spec.routing == "continuous" else r_TPR
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
        r_TPD = along_path(r_TPR, leaf_TP, spec.shape.depth)
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
    logits = functools.partial(logits_at, jax.lax.stop_gradient(r_TPR))
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


def _path_units(z_TPU, r, leaf_TP, spec: TreeSpec, leak) -> jax.Array:
    """g * act(z) of the units on the path; elsewhere 0 (also where a unit is not finite), or what leaks.

    Of decision logits, straight-through routing needs all, r [T, P, R], continuous the path's, r [T, P, D].
    """
    if spec.routing == "straight_through":
        return straight_through(z_TPU, r, leaf_TP, leak, spec)
    units = gates.unit_activation(spec)(z_TPU)
    gates_TPU = _gates_of_units(r, leaf_TP, spec) if spec.routing == "continuous" else None
    return weighted(units, leaf_TP, leak, spec, gates_TPU)


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
