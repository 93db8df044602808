"""Grouped execution: tokens sorted by leaf, dense products per path.

For many tokens and few wide trees. Decisions come from one small product with
all deciding units; then a tree's tokens are sorted by leaf once, and only the
A active units are multiplied. `loop` and `batched` are two forms of the same
block products, for CPUs and for accelerators.
"""

import functools

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree import batched, loop, routing
from tree_ffn.tree.blocks import Weights, make_blocks
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.spec import PrunedSpec, TreeSpec


def trees(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T=None) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out: see `masked.trees`.

    Raises:
      InputError: under differentiation with `straight_through` routing, which
        needs units beside the path; `masked` computes them.
    """
    leaf_TP = routing.leaves(params, x_TE, spec, token_T)
    return along(params, x_TE, leaf_TP, spec), numbered(leaf_TP, params, spec)


def along(params: dict, x_TE: jax.Array, leaf_TP: jax.Array, spec: TreeSpec) -> jax.Array:
    """The same sum for tokens whose leaves (places in the bottom level) are known: s_TE in x's dtype.

    Differentiable in x and in w_in, b_in and w_out; each gradient touches the
    visited units alone, and none goes through the leaves.
    """
    s_TE = routing.renormalised(_blocks(params, x_TE, leaf_TP, spec), params, x_TE, leaf_TP, spec)
    return s_TE.astype(x_TE.dtype)


def _blocks(params, x_TE, leaf_TP, spec):
    arrays = layout_of(spec).stacked({name: params[name] for name in Weights._fields if name in params})
    return _block_products(spec, Weights(**arrays), x_TE, leaf_TP)


def numbered(place_TP: jax.Array, params: dict, spec: TreeSpec) -> jax.Array:
    """Numbers of the leaves at these places of the bottom level: kept leaves have those they had before."""
    if isinstance(spec, PrunedSpec):
        return jnp.take(params["leaf"], place_TP, mode="clip")
    return place_TP


def refuse_straight_through(spec: TreeSpec, implementation: str) -> None:
    """Raises InputError where an execution that walks one path is asked for more."""
    if spec.routing == "straight_through" and isinstance(spec, PrunedSpec):
        raise InputError(
            "routing: 'straight_through' cannot be differentiated in a pruned layer, whose gradient needs "
            "the units that are gone; train before pruning, or prune a layer of another routing."
        )
    if spec.routing == "straight_through":
        raise InputError(
            f"implementation: {implementation!r} cannot differentiate routing 'straight_through', whose "
            "gradient needs the units beside the path; use 'masked', or None to have it chosen."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_products(spec, weights, x_TE, leaf_TP):
    """The sum of the trees, not rounded yet: float32 [T, E]."""
    return _forward(spec, weights, x_TE, leaf_TP)[0]


def _block_products_fwd(spec, weights, x_TE, leaf_TP):
    refuse_straight_through(spec, "grouped")
    return _forward(spec, weights, x_TE, leaf_TP)


def _forward(spec, weights, x_TE, leaf_TP):
    n_tokens, is_forest = x_TE.shape[0], isinstance(spec, PrunedSpec)
    if is_forest:  # one tree, in which every token stands once for each of the pruned trees
        leaf_TP = leaf_TP.T.reshape(-1, 1)
    n_leaves = layout_of(spec).n_leaves
    form = _form()
    size = form.block_size(leaf_TP.shape[0], n_leaves)
    tables = functools.partial(make_blocks, n_leaves=n_leaves, size=size)
    blocks_P = jax.vmap(tables, in_axes=1)(leaf_TP)
    if is_forest:
        blocks_P = blocks_P._replace(order_T=blocks_P.order_T % n_tokens)
    s, z = form.forward(weights, x_TE, blocks_P, size, spec)
    return _joined(s, n_tokens), (weights, x_TE, blocks_P, z)


def _block_products_bwd(spec, saved, ds_TE):
    weights, x_TE, blocks_P, z = saved
    form = _form()
    size = form.block_size(blocks_P.order_T.shape[1], layout_of(spec).n_leaves)
    dx, *grads = form.backward(weights, x_TE, ds_TE.astype(x_TE.dtype), z, blocks_P, size, spec)
    dx_TE = _joined(dx, x_TE.shape[0]).astype(x_TE.dtype)
    grads = [grad.astype(weight.dtype) for grad, weight in zip(grads, weights)]
    return Weights(*grads, threshold=jnp.zeros_like(weights.threshold)), dx_TE, None


def _joined(rows: jax.Array, n_tokens: int) -> jax.Array:
    """Sums of a forest's rows [P * T, E] over its trees; the rows of full trees are sums already."""
    if rows.shape[0] == n_tokens:
        return rows
    return rows.reshape(-1, n_tokens, rows.shape[1]).sum(axis=0)


_block_products.defvjp(_block_products_fwd, _block_products_bwd)


def _form():
    """A loop copies no weights and pads nothing; batched products fill an accelerator."""
    return loop if jax.default_backend() == "cpu" else batched
