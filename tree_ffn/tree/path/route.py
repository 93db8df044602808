"""Decisions and paths: how a token finds its way down a tree.

The decision logit of node n is r[n] = z[n, 0] - threshold[n], the pre-activation
of the node's first unit against a threshold that no optimizer touches. A token
goes right where r > 0; ties and NaN go left. The path is always hard.
"""

import jax
import jax.numpy as jnp

from tree_ffn.tree.path.spec import PrunedSpec, TreeSpec
from tree_ffn.tree.products import pre_activations
from tree_ffn.tree.rows import dots, rows
from tree_ffn.tree.usage import by_level


def route(params: dict, x_TE: jax.Array, spec: TreeSpec) -> tuple[jax.Array, jax.Array]:
    """The path that every token goes in every tree, and its gate, which is 1.

    Args:
      params: of the layer: w_in, b_in, threshold; {router: {w [P,R,E]}} of `frozen`; of a pruned layer its
        structure.
      x_TE: tokens.
      spec: the layer.

    Returns:
      ids_TP int32, paths of all trees in one numbering: p 2^D + leaf, of a pruned layer the leaf's place in
      the bottom level; gates_TP float32. Nothing of it has a gradient.
    """
    ids_TP = walk(params, x_TE, spec)
    return ids_TP, jnp.ones(ids_TP.shape, jnp.float32)


def walk(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """The ids of `route`, node by node.

    Few tokens read the rows of the nodes that they visit; many take one product with the rows of all.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      spec: the layer.
    """
    shape, x_TE = spec.shape, jax.lax.stop_gradient(x_TE)
    params = jax.lax.stop_gradient(params)
    n_tokens = x_TE.shape[0]
    few = isinstance(n_tokens, int) and n_tokens * shape.depth <= shape.n_deciding  # an exported one has none
    logits = None if few else decision_logits(params, x_TE, spec).reshape(n_tokens, -1)
    tree = jnp.arange(shape.n_trees, dtype=jnp.int32)
    place_TP = jnp.broadcast_to(tree[None], (n_tokens, shape.n_trees))
    nodes = 0  # above this level
    for level in range(shape.depth):
        if isinstance(spec, PrunedSpec):
            node_TP = nodes + place_TP
            nodes += spec.nodes[level]
        else:  # place = tree 2^level + place in it; arrays of a tree are R long
            node_TP = tree[None] * (shape.n_deciding - 2**level) + place_TP + 2**level - 1
        if logits is None:
            r_TP = _logits_at(params, x_TE, spec, level, place_TP, node_TP)
        else:
            r_TP = jnp.take_along_axis(logits, node_TP, axis=1, mode="clip")
        right_TP = (r_TP > 0).astype(jnp.int32)
        if isinstance(spec, PrunedSpec):
            place_TP = jnp.take(params["child"].reshape(-1), 2 * node_TP + right_TP, mode="clip")
        else:
            place_TP = 2 * place_TP + right_TP
    return place_TP


def decision_logits(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """Decision logits of all deciding nodes: float32 [T, P, R], of a pruned layer [T, R]; by one product.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      spec: the layer.
    """
    threshold = jax.lax.stop_gradient(params["threshold"]).astype(jnp.float32)
    if not isinstance(spec, PrunedSpec):
        threshold = threshold[:, : spec.shape.n_deciding]
    if spec.router == "frozen":
        w = params["router"]["w"]
        return pre_activations(x_TE, w, jnp.zeros(w.shape[:-1], jnp.float32)) - threshold[None]
    if set(spec.shape.widths) == {1}:  # the product that `combine` asks for too: the compiler makes it once
        z = pre_activations(x_TE, params["w_in"], params["b_in"])
        return z[..., : threshold.shape[-1]] - threshold[None]
    w, b = (_first_units(params[name], spec, axis) for name, axis in (("w_in", -2), ("b_in", -1)))
    return pre_activations(x_TE, w, b) - threshold[None]


def _first_units(array: jax.Array, spec: TreeSpec, axis: int) -> jax.Array:
    """The entries of the deciding nodes' first units, by slices of levels."""
    axis, starts = axis % array.ndim, spec.level_starts
    levels = list(zip(starts, starts[1:], spec.shape.widths))[:-1]
    runs = [jax.lax.slice_in_dim(array, start, end, width, axis) for start, end, width in levels]
    return jnp.concatenate([jax.lax.slice_in_dim(array, 0, 0, axis=axis), *runs], axis)


def _logits_at(params, x_TE, spec: TreeSpec, level: int, place_TP, node_TP) -> jax.Array:
    """Decision logits of the nodes at these places of a level: float32 [T, P]."""
    shape, width = spec.shape, x_TE.shape[1]
    if isinstance(spec, PrunedSpec):
        threshold_TP = jnp.take(params["threshold"], node_TP, mode="clip")
    else:  # thresholds are N a tree, not R
        tree = jnp.arange(shape.n_trees, dtype=jnp.int32)[None]
        above = node_TP + tree * (shape.n_nodes - shape.n_deciding)
        threshold_TP = jnp.take(params["threshold"].reshape(-1), above, mode="clip")
    threshold_TP = threshold_TP.astype(jnp.float32)
    if spec.router == "frozen":
        return dots(x_TE, params["router"]["w"].reshape(-1, width), node_TP, 1)[..., 0] - threshold_TP
    start_TP = place_TP * shape.widths[level] + spec.level_starts[level]
    if not isinstance(spec, PrunedSpec):
        # Units of a tree stand together, and place counts over all trees.
        per_tree = shape.tree_units - 2**level * shape.widths[level]
        start_TP = start_TP + jnp.arange(shape.n_trees, dtype=jnp.int32)[None] * per_tree
    z_TP = dots(x_TE, params["w_in"].reshape(-1, width), start_TP, 1)[..., 0]
    b_TP = rows(params["b_in"].reshape(-1), start_TP, 1)[..., 0]
    return z_TP + b_TP.astype(jnp.float32) - threshold_TP


def straight_through(logits_TPR: jax.Array) -> jax.Array:
    """Decisions, 1 to the right and 0 to the left, that learn: d = [r > 0], dd/dr = s'(r), s the logistic.

    Its slope is by ordinary differentiation, of any order and mode.
    """
    s = jax.nn.sigmoid(jnp.where(jnp.isnan(logits_TPR), 0.0, logits_TPR))
    return (logits_TPR > 0).astype(jnp.float32) + (s - jax.lax.stop_gradient(s))  # exactly 0 or 1


def visits(right_TPR: jax.Array) -> list[jax.Array]:
    """Whether tokens visit the nodes of every level, as products of decisions: a list of [T, P, 2^l].

        visits(root) = 1,   visits(child of n) = visits(n) d[n] to the right, visits(n) (1 - d[n]) to the left

    With straight-through decisions it has their gradient at every visited node n: with V of a node what the
    path from it on would add to the loss, d[n] moves it by V(right) - V(left).

    Args:
      right_TPR: float32 decisions, 1 to the right, of all deciding nodes in heap order.
    """
    levels = [jnp.ones((*right_TPR.shape[:2], 1), jnp.float32)]
    for right in by_level(right_TPR):
        children = levels[-1][..., None] * jnp.stack([1 - right, right], axis=-1)
        levels.append(children.reshape(*right.shape[:2], 2 * right.shape[2]))
    return levels
