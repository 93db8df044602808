"""Pruned path layers: which arrays hold them, how they come from full ones.

Of a layer of P trees some nodes are kept, all trees together K_l of level l
(`PrunedSpec.nodes`), U = sum_l K_l W_l units and R = sum_{l<D} K_l deciding nodes.
Nodes stand in (level, tree, place in the level) order, so a level is a slice:

    w_in [U,E], b_in [U], w_out [U,E]   rows of the kept nodes, nothing else
    threshold [R], router.w [R,E]       of the kept deciding nodes
    child [R,2]    place of the left and right child in the level below; one
                   place twice where the other child is gone
    path [K_D,L]   places of the nodes above each kept leaf, root first; the
                   first column is the leaf's tree
    leaf [K_D]     number, 0 .. 2^D - 1, that each kept leaf has in its full tree

The last three are int32 and no optimizer touches them. A node with one child
keeps its units; its decision is constant.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.tree.path.spec import PrunedSpec, TreeSpec
from tree_ffn.tree.shape import TreeShape

STRUCTURE = ("child", "path", "leaf")


def array_shapes(spec: PrunedSpec, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a pruned layer's own arrays, without b_out."""
    n_units, n_deciding = spec.total_units, sum(spec.nodes[:-1])
    shapes: dict[str, tuple[int, ...]] = {
        "w_in": (n_units, width),
        "b_in": (n_units,),
        "w_out": (n_units, width),
        "threshold": (n_deciding,),
        "child": (n_deciding, 2),
        "path": (spec.nodes[-1], spec.shape.n_levels),
        "leaf": (spec.nodes[-1],),
    }
    if spec.router == "frozen":
        shapes["router.w"] = (n_deciding, width)
    return shapes


def prune(params: dict, spec: TreeSpec, keep_PJ: np.ndarray) -> tuple[PrunedSpec, dict]:
    """The same layer with the named leaves and the nodes above them, stored without the others.

    A token that reaches a node with one child left goes to that child. Tokens
    whose leaf is kept in every tree keep their output.

    Args:
      params: of a path layer, pruned already or not; NumPy arrays or jax's.
      spec: the layer.
      keep_PJ: bool [P, 2^D], the leaves to keep, at least one of every tree;
        of a pruned layer, leaves that it still has.

    Returns:
      the spec and the arrays (NumPy) of the pruned layer.

    Raises:
      InputError: a tree would lose all its leaves, or a leaf is gone already.

    Example:
      >>> from tree_ffn.tree.path import init_params
      >>> spec = TreeSpec(TreeShape(n_trees=1, depth=1))
      >>> params = init_params(jax.random.key(0), spec, width=4)
      >>> pruned_spec, pruned = prune(params, spec, np.array([[False, True]]))
      >>> pruned_spec.nodes, pruned["w_in"].shape, pruned["child"].tolist()
      ((1, 1), (2, 4), [[0, 0]])
    """
    params, shape = jax.tree.map(np.asarray, params), spec.shape
    _check_keep(params, spec, keep_PJ)
    kept = [keep_PJ.reshape(shape.n_trees, 2**level, -1).any(axis=-1) for level in range(shape.n_levels)]
    fields = {name: getattr(spec, name) for name in TreeSpec.__dataclass_fields__}
    pruned_spec = PrunedSpec(**fields, nodes=tuple(int(level.sum()) for level in kept))
    rows, deciding = _kept_rows(params, spec, kept)
    width = params["b_out"].shape[0]
    new = {name: params[name].reshape(-1, width)[rows] for name in ("w_in", "w_out")}
    new |= {"b_in": params["b_in"].reshape(-1)[rows], "b_out": params["b_out"]}
    threshold = params["threshold"]
    if not isinstance(spec, PrunedSpec):  # which has a threshold for leaves too
        threshold = threshold[:, : shape.n_deciding]
    new["threshold"] = threshold.reshape(-1)[deciding]
    if spec.router == "frozen":
        new["router"] = {"w": params["router"]["w"].reshape(-1, width)[deciding]}
    return pruned_spec, new | _structure(kept)


def present_leaves(params: dict, spec: TreeSpec) -> np.ndarray:
    """The leaves that a layer has: bool [P, 2^D]; all of them unless it was pruned."""
    present_PJ = np.ones((spec.shape.n_trees, spec.shape.n_leaves), bool)
    if isinstance(spec, PrunedSpec):
        present_PJ[:] = False
        present_PJ[np.asarray(params["path"])[:, 0], np.asarray(params["leaf"])] = True
    return present_PJ


def init_structure(spec: PrunedSpec) -> dict[str, np.ndarray]:
    """`child`, `path` and `leaf` of trees with these numbers of nodes: a level's first nodes fork."""
    place_K = np.arange(spec.nodes[0])
    leaf_K, children, paths = np.zeros_like(place_K), [], [place_K[:, None]]
    for count, below in zip(spec.nodes, spec.nodes[1:]):
        forks = below - count
        left = np.minimum(np.arange(count), forks) + np.arange(count)
        children.append(np.stack([left, left + (np.arange(count) < forks)], axis=1))
        parent = np.repeat(np.arange(count), np.where(np.arange(count) < forks, 2, 1))
        right = np.arange(below) - left[parent]
        leaf_K = 2 * leaf_K[parent] + right
        paths.append(np.concatenate([paths[-1][parent], np.arange(below)[:, None]], axis=1))
    child = np.concatenate([np.zeros((0, 2), int), *children])
    return {name: a.astype(np.int32) for name, a in zip(STRUCTURE, (child, paths[-1], leaf_K))}


def sides(structure: dict, counts_PJ: jax.Array, spec: PrunedSpec) -> tuple[jax.Array, jax.Array]:
    """Visits of both children of every kept deciding node, [R] each, left first, from those of leaves.

    Args:
      structure: {path [J, L], leaf [J], ...} of the kept leaves.
      counts_PJ: int32 visits of all leaves [P, 2^D].
      spec: the layer.
    """
    path_JL, leaf_J = structure["path"], structure["leaf"]
    counts_J, found = counts_PJ[path_JL[:, 0], leaf_J], [jnp.zeros((0, 2), counts_PJ.dtype)]
    for level in range(spec.shape.depth):
        side_J = (leaf_J >> (spec.shape.depth - 1 - level)) & 1
        here_J2 = jnp.where(side_J[:, None] == jnp.arange(2)[None], counts_J[:, None], 0)
        place_J, n_nodes = path_JL[:, level], spec.nodes[level]
        found.append(jax.ops.segment_sum(here_J2, place_J, n_nodes, indices_are_sorted=True))
    visits_R2 = jnp.concatenate(found)
    return visits_R2[:, 0], visits_R2[:, 1]


def _kept_rows(params: dict, spec: TreeSpec, kept: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the kept nodes' units, and entries of the kept deciding nodes, in the layer's flat arrays."""
    shape, rows, deciding = spec.shape, [], [np.zeros(0, int)]
    tree_P1 = np.arange(shape.n_trees)[:, None]
    nodes = 0
    for level, width in enumerate(shape.widths):
        if isinstance(spec, PrunedSpec):
            place_PJ = np.zeros((shape.n_trees, 2**level), int)
            leaf = params["leaf"] >> (shape.depth - level)
            place_PJ[params["path"][:, 0], leaf] = params["path"][:, level]
            first_PJ, node_PJ = spec.level_starts[level] + place_PJ * width, nodes + place_PJ
            nodes += spec.nodes[level]
        else:
            place_J = np.arange(2**level)[None]
            first_PJ = tree_P1 * shape.tree_units + spec.level_starts[level] + place_J * width
            node_PJ = tree_P1 * shape.n_deciding + 2**level - 1 + place_J
        rows.append((first_PJ[kept[level]][:, None] + np.arange(width)[None]).reshape(-1))
        if level < shape.depth:
            deciding.append(node_PJ[kept[level]])
    return np.concatenate(rows), np.concatenate(deciding)


def _structure(kept: list[np.ndarray]) -> dict[str, np.ndarray]:
    """`child`, `path` and `leaf` of the kept nodes, per level bool [P, 2^l]."""
    depth = len(kept) - 1
    place = [np.cumsum(level).reshape(level.shape) - 1 for level in kept]
    children = [np.zeros((0, 2), int)]
    for above, level, place_below in zip(kept, kept[1:], place[1:]):
        pairs, places = (a.reshape(*above.shape, 2)[above] for a in (level, place_below))
        left, right = pairs[:, :1], pairs[:, 1:]
        children.append(np.where(pairs, places, np.where(left & ~right, places[:, :1], places[:, 1:])))
    tree, leaf = np.nonzero(kept[-1])
    path = np.stack([place[level][tree, leaf >> (depth - level)] for level in range(depth + 1)], axis=1)
    found = (np.concatenate(children), path, leaf)
    return {name: array.astype(np.int32) for name, array in zip(STRUCTURE, found)}


def _check_keep(params: dict, spec: TreeSpec, keep_PJ: np.ndarray) -> None:
    shape: TreeShape = spec.shape
    if keep_PJ.shape != (shape.n_trees, shape.n_leaves) or keep_PJ.dtype != bool:
        raise InputError(
            f"keep: {keep_PJ.dtype}{list(keep_PJ.shape)} is not allowed; use "
            f"bool[{shape.n_trees}, {shape.n_leaves}]."
        )
    if not keep_PJ.any(axis=1).all():
        tree = int(np.argmin(keep_PJ.any(axis=1)))
        raise InputError(f"keep: tree {tree} would lose all its leaves; keep at least one of every tree.")
    if (keep_PJ & ~present_leaves(params, spec)).any():
        raise InputError("keep: a leaf that was pruned before is not allowed; keep leaves that are there.")
