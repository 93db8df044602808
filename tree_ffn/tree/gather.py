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

from tree_ffn.tree import gates, grouped, kernels, routing
from tree_ffn.tree.layout import Layout, layout_of
from tree_ffn.tree.spec import TreeSpec


def trees(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out: see `masked.trees`.

    Raises:
      InputError: under differentiation with `straight_through` routing, which
        needs units beside the path; `masked` computes them.
    """
    right_TPH = routing.hashed_sides(params, spec, token_T)
    s_TE, leaf_TP = _trees(spec, params, x_TE, right_TPH)
    return s_TE, grouped.numbered(leaf_TP, params, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trees(spec: TreeSpec, params: dict, x_TE: jax.Array, right_TPH: jax.Array | None):
    """Sum of the trees, and the leaf's place in the bottom level; sides not given are decided here."""
    layout = layout_of(spec, params)
    stored, params = params, layout.stacked(params)
    if spec.beam > 1:
        # Else the gather of the leaf's rows would compute the search again for every number that it copies.
        leaf_TP, gate_TP = jax.lax.optimization_barrier(_searched(stored, x_TE, layout, right_TPH))
        if not any(layout.outputs.widths[:-1]):  # the search has read all routers that the leaf's units need
            z_TPW = _pre_activations(params, x_TE, layout, spec.shape.depth, leaf_TP)
            s_TE = _added(params, z_TPW, layout, spec.shape.depth, leaf_TP, gate_TP, x_TE.dtype)
            return _normed(s_TE, gate_TP, spec).astype(x_TE.dtype), leaf_TP
        right_TPH = layout.sides(leaf_TP)
    position_TP = layout.roots(x_TE.shape[0])
    gate_TP = jnp.ones(position_TP.shape, jnp.float32)
    s_TE = jnp.zeros(x_TE.shape, jnp.float32)
    for level in range(spec.shape.depth + 1):
        z_TPW = _pre_activations(params, x_TE, layout, level, position_TP)
        if layout.outputs.widths[level]:
            s_TE += _added(params, z_TPW, layout, level, position_TP, gate_TP, x_TE.dtype)
        if level < spec.shape.depth:
            # The compiler drops it where a hash decides.
            r_TP = _decide(params, x_TE, z_TPW, layout.node_starts[level] + position_TP, spec)
            if right_TPH is not None and level < right_TPH.shape[-1]:
                right_TP = right_TPH[..., level]
            else:
                right_TP = r_TP > 0
            if level >= spec.hash_levels:
                gate_TP = gates.child_gate(gate_TP, gates.towards(r_TP, right_TP, spec), spec)
            position_TP = layout.child(level, position_TP, right_TP)
    return _normed(s_TE, gate_TP, spec).astype(x_TE.dtype), position_TP


def _trees_fwd(spec, params, x_TE, right_TPH):
    grouped.refuse_straight_through(spec, "gather")
    s_TE, leaf_TP = _trees(spec, params, x_TE, right_TPH)
    return (s_TE, leaf_TP), (params, x_TE, leaf_TP)


def _trees_bwd(spec, saved, cotangents):
    params, x_TE, leaf_TP = saved
    _, vjp = jax.vjp(lambda p, x: grouped.along(p, x, leaf_TP, spec), params, x_TE)
    return *vjp(cotangents[0]), None


_trees.defvjp(_trees_fwd, _trees_bwd)


def _searched(params, x_TE, layout: Layout, right_TPH) -> tuple[jax.Array, jax.Array]:
    """The leaf that a beam finds, and its gate: [T, P] each.

    Few tokens read the routers that they ask. Many would read most of them many times: a product of all
    routers costs less from about twice as many askings as routers on, or 32 times where rows are read where
    they lie (in trials on a CPU).
    """
    spec, n_tokens = layout.spec, x_TE.shape[0]
    stacked = layout.stacked(params)

    def asked(level, place_TP):
        z_TPW = _pre_activations(stacked, x_TE, layout, level, place_TP, width=1)
        return _decide(stacked, x_TE, z_TPW, layout.node_starts[level] + place_TP, spec)

    worth = 32 if in_place(x_TE.dtype, stacked["w_in"].dtype) else 2
    if n_tokens * spec.n_routers > worth * sum(spec.level_nodes[:-1]):
        asked = routing.gathered(routing.logits_of(params, x_TE, spec), layout)
    return routing.search(asked, layout, n_tokens, right_TPH)


def _pre_activations(params, x_TE, layout: Layout, level: int, place_TP, width: int | None = None):
    """z of the first `width` units (all) of a node for every token and tree: float32 [T, P, W]."""
    start_TP = layout.unit_starts[level] + place_TP * layout.widths[level]
    width = width or layout.widths[level]
    b_TPW = _rows(params["b_in"], start_TP, width).astype(jnp.float32)
    return _dots(x_TE, params["w_in"], start_TP, width) + b_TPW


def _added(params, z_TPW, layout: Layout, level: int, place_TP, gate_TP, dtype):
    """What the units of these nodes add to the sum, by products in `dtype`: float32 [T, E]."""
    act, n_out = gates.unit_activation(layout.spec), layout.outputs.widths[level]
    h_TPW = (gate_TP[..., None] * act(z_TPW[..., layout.widths[level] - n_out :])).astype(dtype)
    return _sums(h_TPW, params["w_out"], layout.outputs.unit_starts[level] + place_TP * n_out)


def _dots(x_TE, rows_PUE, start_TP, width: int):
    """Products of each token with runs of rows: float32 [T, P, width]. See `kernels.dots`."""

    def by_xla(x_TE, rows_PUE, start_TP):
        w_TPWE = _rows(rows_PUE, start_TP, width).astype(x_TE.dtype)
        return jnp.einsum("te,tpwe->tpw", x_TE, w_TPWE, preferred_element_type=jnp.float32)

    return _read(functools.partial(kernels.dots, width=width), by_xla, x_TE, rows_PUE, start_TP)


def _sums(h_TPW, rows_PUE, start_TP):
    """Sums of runs of rows by weights of each token: float32 [T, E]. See `kernels.sums`."""

    def by_xla(h_TPW, rows_PUE, start_TP):
        w_TPWE = _rows(rows_PUE, start_TP, h_TPW.shape[-1]).astype(h_TPW.dtype)
        return jnp.einsum("tpw,tpwe->te", h_TPW, w_TPWE, preferred_element_type=jnp.float32)

    return _read(kernels.sums, by_xla, h_TPW, rows_PUE, start_TP)


def _read(kernel, by_xla, numbers, rows_PUE, start_TP):
    """What a kernel makes of numbers and runs of rows where it may run, else XLA."""
    if not in_place(numbers.dtype, rows_PUE.dtype):
        return by_xla(numbers, rows_PUE, start_TP)
    return jax.lax.platform_dependent(numbers, rows_PUE, start_TP, cpu=kernel, default=by_xla)


def in_place(*dtypes) -> bool:
    """Whether rows and numbers of these dtypes are read where they lie: on a CPU, after `make kernels`."""
    on_cpu = jax.default_backend() == "cpu" and kernels.is_loaded()
    return on_cpu and all(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)


def _normed(s_TE, gate_TP, spec: TreeSpec):
    """A sum of trees over the norm of their leaves' gates, where the layer says so."""
    return s_TE / gates.gate_norm(gate_TP, spec.gate_norm) if spec.renormalise else s_TE


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
