"""Gather execution: level by level, each token reads its node's rows.

For few tokens: it reads the A active units' weights and nothing else. Rows are
gathered and met by a dot product (an `einsum`: a fused multiply-and-sum is
slower on CPUs in trials). The backward pass never differentiates a gather,
which would scatter with every token on the root's rows: it sorts the tokens
into blocks, as the grouped execution does.
"""

import functools

import jax
import jax.numpy as jnp

from tree_ffn.tree import gates, grouped, routing
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.spec import TreeSpec


def trees(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out: see `masked.trees`.

    Raises:
      InputError: under differentiation with `straight_through` routing, which
        needs units beside the path; `masked` computes them.
    """
    right_TPH = routing.hashed_sides(params, spec, token_T)
    if spec.beam > 1:
        right_TPH = _searched_sides(params, x_TE, spec, right_TPH)
    s_TE, leaf_TP = _trees(spec, params, x_TE, right_TPH)
    return s_TE, grouped.numbered(leaf_TP, params, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trees(spec: TreeSpec, params: dict, x_TE: jax.Array, right_TPH: jax.Array | None):
    """Sum of the trees, and the leaf's place in the bottom level; sides not given are decided here."""
    shape, dtype = spec.shape, x_TE.dtype
    layout = layout_of(spec, params)
    outputs, params = layout.outputs, layout.stacked(params)
    position = layout.roots(x_TE.shape[0])
    gate = jnp.ones(position.shape, jnp.float32)
    act = gates.unit_activation(spec)
    s_TE = jnp.zeros(x_TE.shape, jnp.float32)
    for level, width in enumerate(shape.widths):
        start_TP = layout.unit_starts[level] + position * width
        w_in_TPWE = _rows(params["w_in"], start_TP, width).astype(dtype)
        b_in_TPW = _rows(params["b_in"], start_TP, width).astype(jnp.float32)
        z_TPW = jnp.einsum("te,tpwe->tpw", x_TE, w_in_TPWE, preferred_element_type=jnp.float32) + b_in_TPW
        if n_out := outputs.widths[level]:
            start_TP = outputs.unit_starts[level] + position * n_out
            w_out_TPWE = _rows(params["w_out"], start_TP, n_out).astype(dtype)
            h_TPW = (gate[..., None] * act(z_TPW[..., width - n_out :])).astype(dtype)
            s_TE += jnp.einsum("tpw,tpwe->te", h_TPW, w_out_TPWE, preferred_element_type=jnp.float32)
        if level < shape.depth:
            # The compiler drops it where a hash decides.
            r_TP = _decide(params, x_TE, z_TPW, layout.node_starts[level] + position, spec)
            if right_TPH is not None and level < right_TPH.shape[-1]:
                right_TP = right_TPH[..., level]
            else:
                right_TP = r_TP > 0
            if level >= spec.hash_levels:
                gate = gates.child_gate(gate, gates.towards(r_TP, right_TP, spec), spec)
            position = layout.child(level, position, right_TP)
    if spec.renormalise:
        s_TE /= gates.gate_norm(gate, spec.gate_norm)
    return s_TE.astype(dtype), position


def _trees_fwd(spec, params, x_TE, right_TPH):
    grouped.refuse_straight_through(spec, "gather")
    s_TE, leaf_TP = _trees(spec, params, x_TE, right_TPH)
    return (s_TE, leaf_TP), (params, x_TE, leaf_TP)


def _trees_bwd(spec, saved, cotangents):
    params, x_TE, leaf_TP = saved
    _, vjp = jax.vjp(lambda p, x: grouped.along(p, x, leaf_TP, spec), params, x_TE)
    return *vjp(cotangents[0]), None


_trees.defvjp(_trees_fwd, _trees_bwd)


def _searched_sides(params, x_TE, spec: TreeSpec, right_TPH):
    """The way to the leaf that a beam finds, right where true: bool [T, P, D]. Routers are read as asked."""
    layout, stacked = layout_of(spec, params), jax.lax.stop_gradient(layout_of(spec).stacked(params))
    x_TE = jax.lax.stop_gradient(x_TE)

    def logits(level, place_TP):
        start_TP = layout.unit_starts[level] + place_TP * layout.widths[level]
        w_TPE = _rows(stacked["w_in"], start_TP, 1)[:, :, 0].astype(x_TE.dtype)
        b_TP = _rows(stacked["b_in"], start_TP, 1)[..., 0].astype(jnp.float32)
        z_TP = jnp.einsum("te,tpe->tp", x_TE, w_TPE, preferred_element_type=jnp.float32) + b_TP
        return _decide(stacked, x_TE, z_TP[..., None], layout.node_starts[level] + place_TP, spec)

    place_TP = routing.search(logits, layout, x_TE.shape[0], right_TPH)
    return layout.sides(place_TP)


def _decide(params, x_TE, z_TPW, node_TP, spec):
    """Decision logits of the visited nodes: float32 [T, P]."""
    threshold_TP = _rows(params["threshold"], node_TP, 1)[..., 0].astype(jnp.float32)
    if spec.router == "frozen":
        w_TPE = _rows(params["router"]["w"], node_TP, 1)[:, :, 0].astype(x_TE.dtype)
        return jnp.einsum("te,tpe->tp", x_TE, w_TPE, preferred_element_type=jnp.float32) - threshold_TP
    return z_TPW[..., 0] - threshold_TP


def _rows(array_PU, start_TP: jax.Array, width: int) -> jax.Array:
    """Runs of `width` rows, one a token and tree, from [P, U, ...]: [T, P, width, ...].

    One gather of whole runs from the array as it is stored, so that no level is
    sliced out first. Indices are in range by construction.
    """
    trees = jnp.broadcast_to(jnp.arange(array_PU.shape[0], dtype=jnp.int32)[None], start_TP.shape)
    rest = array_PU.shape[2:]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(2, 3 + len(rest))), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    return jax.lax.gather(
        array_PU,
        jnp.stack([trees, start_TP], axis=-1),
        numbers,
        slice_sizes=(1, width, *rest),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
