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
    weights = Weights(params["w_in"], params["b_in"], params["w_out"], params["threshold"])
    return _block_products(spec, weights, x_TE, leaf_TP)


def refuse_straight_through(spec: TreeSpec, implementation: str) -> None:
    """Raises InputError where an execution that walks one path is asked for more."""
    if spec.routing == "straight_through":
        raise InputError(
            f"implementation: {implementation!r} cannot differentiate routing 'straight_through', whose "
            "gradient needs the units beside the path; use 'masked', or None to have it chosen."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_products(spec, weights, x_TE, leaf_TP):
    return _forward(spec, weights, x_TE, leaf_TP)[0]


def _block_products_fwd(spec, weights, x_TE, leaf_TP):
    refuse_straight_through(spec, "grouped")
    return _forward(spec, weights, x_TE, leaf_TP)


def _forward(spec, weights, x_TE, leaf_TP):
    form, size = _form_and_size(x_TE, spec)
    tables = functools.partial(make_blocks, n_leaves=spec.shape.n_leaves, size=size)
    blocks_P = jax.vmap(tables, in_axes=1)(leaf_TP)
    s_TE, z = form.forward(weights, x_TE, blocks_P, size, spec)
    return s_TE, (weights, x_TE, blocks_P, z)


def _block_products_bwd(spec, saved, ds_TE):
    weights, x_TE, blocks_P, z = saved
    form, size = _form_and_size(x_TE, spec)
    dx_TE, *grads = form.backward(weights, x_TE, ds_TE, z, blocks_P, size, spec)
    grads = [grad.astype(weight.dtype) for grad, weight in zip(grads, weights)]
    return Weights(*grads, threshold=jnp.zeros_like(weights.threshold)), dx_TE, None


_block_products.defvjp(_block_products_fwd, _block_products_bwd)


def _form():
    """A loop copies no weights and pads nothing; batched products fill an accelerator."""
    return loop if jax.default_backend() == "cpu" else batched


def _form_and_size(x_TE, spec):
    form = _form()
    return form, form.block_size(x_TE.shape[0], spec.shape.n_leaves)
