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
from tree_ffn.tree.blocks import Tree, block_size, make_blocks
from tree_ffn.tree.spec import TreeSpec


def trees(params: dict, x_TE: jax.Array, spec: TreeSpec) -> tuple[jax.Array, jax.Array]:
    """Sum of the trees' paths, without shared units and b_out: see `masked.trees`.

    Raises:
      InputError: under differentiation with `straight_through` routing, which
        needs units beside the path; `masked` computes them.
    """
    leaf_TP = routing.walk(routing.decision_logits(params, x_TE, spec), spec.shape.depth)
    return block_products(params, x_TE, leaf_TP, spec), leaf_TP


def block_products(params: dict, x_TE: jax.Array, leaf_TP: jax.Array, spec: TreeSpec) -> jax.Array:
    """The same sum for tokens whose leaves are known: s_TE in x's dtype.

    Differentiable in x and in w_in, b_in and w_out; each gradient touches the
    visited units alone, and none goes through the leaves.
    """
    stacked = Tree(params["w_in"], params["b_in"], params["w_out"], params["threshold"])
    return _block_products(spec, stacked, x_TE, leaf_TP)


def refuse_straight_through(spec: TreeSpec, implementation: str) -> None:
    """Raises InputError where an execution that walks one path is asked for more."""
    if spec.routing == "straight_through":
        raise InputError(
            f"implementation: {implementation!r} cannot differentiate routing 'straight_through', whose "
            "gradient needs the units beside the path; use 'masked', or None to have it chosen."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_products(spec, stacked, x_TE, leaf_TP):
    return _forward(spec, stacked, x_TE, leaf_TP)[0]


def _forward(spec, stacked, x_TE, leaf_TP):
    form = _form()
    size = block_size(x_TE.shape[0], spec.shape.n_leaves)

    def one_tree(tree, leaf_T):
        blocks = make_blocks(leaf_T, spec.shape.n_leaves, size)
        s_TE, z = form.forward(tree, x_TE, blocks, size, spec)
        return s_TE, (blocks, z)

    def add_tree(sum_TE, inputs):
        s_TE, saved = one_tree(*inputs)
        return sum_TE + s_TE.astype(jnp.float32), saved

    if spec.shape.n_trees == 1:
        s_TE, saved = one_tree(_only(stacked), leaf_TP[:, 0])
        return s_TE, jax.tree.map(lambda leaf: leaf[None], saved)
    zeros = jnp.zeros(x_TE.shape, jnp.float32)
    s_TE, saved = jax.lax.scan(add_tree, zeros, (stacked, leaf_TP.T))
    return s_TE.astype(x_TE.dtype), saved


def _block_products_fwd(spec, stacked, x_TE, leaf_TP):
    refuse_straight_through(spec, "grouped")
    s_TE, saved = _forward(spec, stacked, x_TE, leaf_TP)
    return s_TE, (stacked, x_TE, saved)


def _block_products_bwd(spec, residuals, ds_TE):
    stacked, x_TE, (blocks_P, z_P) = residuals
    form = _form()
    size = block_size(x_TE.shape[0], spec.shape.n_leaves)

    def add_tree(dx_TE, inputs):
        tree, blocks, z = inputs
        dx, dw_in, db_in, dw_out = form.backward(tree, x_TE, ds_TE, z, blocks, size, spec)
        grads = (
            dw_in.astype(tree.w_in_UE.dtype),
            db_in.astype(tree.b_in_U.dtype),
            dw_out.astype(tree.w_out_UE.dtype),
        )
        return dx_TE + dx.astype(jnp.float32), grads

    zeros = jnp.zeros(x_TE.shape, jnp.float32)
    if spec.shape.n_trees == 1:
        dx_TE, grads = add_tree(zeros, _only((stacked, blocks_P, z_P)))
        grads = jax.tree.map(lambda leaf: leaf[None], grads)
    else:
        dx_TE, grads = jax.lax.scan(add_tree, zeros, (stacked, blocks_P, z_P))
    return Tree(*grads, jnp.zeros_like(stacked.threshold_N)), dx_TE.astype(x_TE.dtype), None


_block_products.defvjp(_block_products_fwd, _block_products_bwd)


def _form():
    """A loop copies no weights and pads nothing; batched products fill an accelerator."""
    return loop if jax.default_backend() == "cpu" else batched


def _only(stacked):
    return jax.tree.map(lambda leaf: leaf[0], stacked)
