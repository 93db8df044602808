"""Arrays with an entry for every node or unit, and the paths through them, elementwise.

What is on a token's path is said by its leaf: a node is if it is the leaf's ancestor at its level.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.spec import TreeSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def along_path(r_TPR, leaf_TP, depth: int):
    """Decision logits of the nodes above each leaf, root first: [T, P, D].

    Backward the path is found anew from its leaf, so that nothing of R entries is kept.
    """
    levels = [logits_at(r_TPR, level, leaf_TP >> (depth - level))[..., None] for level in range(depth)]
    return jnp.concatenate([r_TPR[..., :0], *levels], axis=-1)


def logits_at(r_TPR, level: int, place_TP):
    """Logits of one node of a level for every token and tree: [T, P]."""
    r_TPJ = r_TPR[..., 2**level - 1 : 2 ** (level + 1) - 1]
    # A masked sum, not a gather: the logits were just computed, and a GPU reads them in order faster.
    return jnp.where(_is_node(place_TP, level), r_TPJ, 0.0).sum(axis=-1)


def _along_path_fwd(r_TPR, leaf_TP, depth):
    return along_path(r_TPR, leaf_TP, depth), leaf_TP


def _along_path_bwd(depth, leaf_TP, dr_TPD):
    return onto_path(dr_TPD, leaf_TP, depth), None


along_path.defvjp(_along_path_fwd, _along_path_bwd)


def onto_path(value_TPD, leaf_TP, depth: int):
    """Values of the nodes above each leaf, put where these nodes are; elsewhere 0: [T, P, R]."""
    levels = [
        jnp.where(_is_node(leaf_TP >> (depth - level), level), value_TPD[..., level, None], 0.0)
        for level in range(depth)
    ]
    return jnp.concatenate([value_TPD[..., :0], *levels], axis=-1)


def weighted(units_TPU, leaf_TP, leak, spec: TreeSpec, gates_TPU=None):
    """Units on the path times their gates, 1 where none are given; elsewhere 0, or the share `leak` of them.

    With a leak gates are leak + (1 - leak) g.
    """
    levels, nodes = _unit_tables(spec)
    visited_TPU = (leaf_TP[..., None] >> (spec.shape.depth - levels)[None, None]) == nodes[None, None]
    on_path = units_TPU if gates_TPU is None else gates_TPU * units_TPU
    if leak is None:
        return jnp.where(visited_TPU, on_path, 0.0)
    # A leak that has ended is none, also of a unit that is not finite.
    off_path = jnp.where(leak > 0, leak * units_TPU, 0.0)
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
