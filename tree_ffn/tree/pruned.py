"""Pruned layers: which arrays hold them, how they come from full ones, how they are balanced.

Of a layer of P trees some nodes are kept, all trees together K_l of level l
(`PrunedSpec.nodes`), U = sum_l K_l W_l units and R = sum_{l<D} K_l deciding nodes.
Nodes stand in (level, tree, place in the level) order, so a level is a slice:

    w_in [U,E], b_in [U], w_out [U,E]   rows of the kept nodes, nothing else (w_out: without silent routers)
    threshold [R], router.w [R,E]       of the kept deciding nodes
    child [R,2]    place of the left and right child in the level below; one
                   place twice where the other child is gone
    path [K_D,L]   places of the nodes above each kept leaf, root first; the
                   first column is the leaf's tree
    leaf [K_D]     number, 0 .. 2^D - 1, that each kept leaf has in its full tree

The last three are int32 and no optimizer touches them. A node with one child
keeps its units and, under continuous routing, its gate (with a beam, that of the
child's own side); its decision is constant.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.tree.balancing import balance_step
from tree_ffn.tree.layout import Layout, layout_of
from tree_ffn.tree.shape import TreeShape
from tree_ffn.tree.spec import PrunedSpec, TreeSpec
from tree_ffn.tree.usage import leaf_counts

STRUCTURE = ("child", "path", "leaf")


def array_shapes(spec: PrunedSpec, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a pruned layer's own arrays, without b_out and the shared units."""
    layout, shape = layout_of(spec), spec.shape
    shapes: dict[str, tuple[int, ...]] = {
        "w_in": (spec.kept_units, width),
        "b_in": (spec.kept_units,),
        "w_out": (layout.outputs.unit_starts[-1], width),
        "threshold": (layout.n_deciding,),
        "child": (layout.n_deciding, 2),
        "path": (layout.n_leaves, shape.n_levels),
        "leaf": (layout.n_leaves,),
    }
    if spec.router == "frozen":
        shapes["router.w"] = (layout.n_deciding, width)
    return shapes


def prune(params: dict, spec: TreeSpec, keep_PJ: np.ndarray) -> tuple[PrunedSpec, dict]:
    """The same layer with the named leaves and the nodes above them, stored without the others.

    A token that reaches a node with one child left goes to that child. Tokens
    whose leaf is kept in every tree keep their output; with a beam, unless the
    search now finds a likelier leaf, where a removed node took a place in it.

    Args:
      params: of a layer of trees, pruned already or not; NumPy arrays or jax's.
      spec: the layer.
      keep_PJ: bool [P, 2^D], the leaves to keep, at least one of every tree;
        of a pruned layer, leaves that it still has.

    Returns:
      the spec and the arrays (NumPy) of the pruned layer.

    Raises:
      InputError: a tree would lose all its leaves, or a leaf is gone already.

    Example:
      >>> from tree_ffn.tree import TreeShape, TreeSpec, init_params
      >>> spec = TreeSpec(TreeShape(n_trees=1, depth=1))
      >>> params = init_params(jax.random.key(0), spec, width=4)
      >>> pruned_spec, pruned = prune(params, spec, np.array([[False, True]]))
      >>> pruned_spec.nodes, pruned["w_in"].shape, pruned["child"].tolist()
      ((1, 1), (2, 4), [[0, 0]])
    """
    params, shape = jax.tree.map(np.asarray, params), spec.shape
    _check_keep(params, spec, keep_PJ)
    kept = [_per_level(keep_PJ, level, np.any) for level in range(shape.n_levels)]
    fields = {**_fields(spec), "leak": 0.0}  # there is nothing left to train off the path
    pruned_spec = PrunedSpec(**fields, nodes=tuple(int(level.sum()) for level in kept))
    layout, place = layout_of(spec), _places(params, spec)
    rows, out_rows = (_unit_rows(place, kept, spec, of) for of in (layout, layout.outputs))
    deciding = _deciding_nodes(place, kept, spec)
    width = params["b_out"].shape[0]
    new = {name: params[name] for name in ("b_out", "shared", "salt") if name in params}
    of_units = {"w_in": rows, "w_out": out_rows}
    new |= {name: params[name].reshape(-1, width)[at] for name, at in of_units.items()}
    new |= {"b_in": params["b_in"].reshape(-1)[rows], "threshold": params["threshold"].reshape(-1)[deciding]}
    if spec.router == "frozen":
        # A full layer has a threshold for every node, a frozen router for every deciding one.
        routers = deciding
        if not isinstance(spec, PrunedSpec):
            routers = deciding // shape.n_nodes * shape.n_deciding + deciding % shape.n_nodes
        new["router"] = {"w": params["router"]["w"].reshape(-1, width)[routers]}
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


def balance_update(routing: dict, leaf_TP: jax.Array, spec: PrunedSpec) -> jax.Array:
    """Thresholds [R] after one step of sign balancing: nodes with one child left stay as they are.

    Args:
      routing: `threshold` and the structure of the layer.
      leaf_TP: int32 leaves of the step's tokens.
      spec: `balance_rate` is read.
    """
    path_JL, leaf_J, threshold_R = routing["path"], routing["leaf"], routing["threshold"]
    if spec.shape.depth == 0:
        return threshold_R
    counts_J = leaf_counts(leaf_TP, spec.shape.n_leaves)[path_JL[:, 0], leaf_J]
    sides = []
    for level in range(spec.shape.depth):
        side_J = (leaf_J >> (spec.shape.depth - 1 - level)) & 1
        here_J2 = jnp.where(side_J[:, None] == jnp.arange(2)[None], counts_J[:, None], 0)
        place_J, n_nodes = path_JL[:, level], spec.nodes[level]
        sides.append(jax.ops.segment_sum(here_J2, place_J, n_nodes, indices_are_sorted=True))
    visits_R2 = jnp.concatenate(sides)
    forks_R = routing["child"][:, 0] != routing["child"][:, 1]
    step_R = jnp.where(forks_R, balance_step(visits_R2[:, 0], visits_R2[:, 1], spec), 0.0)
    return threshold_R + step_R.astype(threshold_R.dtype)


def _fields(spec: TreeSpec) -> dict:
    """The fields of TreeSpec, of a pruned spec too."""
    return {name: getattr(spec, name) for name in TreeSpec.__dataclass_fields__}


def _per_level(per_leaf_PJ: np.ndarray, level: int, reduce) -> np.ndarray:
    """[P, 2^l] of [P, 2^D]: what the leaves below each node of a level come to."""
    return reduce(per_leaf_PJ.reshape(len(per_leaf_PJ), 2**level, -1), axis=-1)


def _places(params: dict, spec: TreeSpec) -> list[np.ndarray]:
    """Per level [P, 2^l]: the place of each node, within its tree, or of a pruned layer over all trees."""
    shape = spec.shape
    if not isinstance(spec, PrunedSpec):
        return [np.tile(np.arange(2**level), (shape.n_trees, 1)) for level in range(shape.n_levels)]
    places = []
    for level in range(shape.n_levels):
        place = np.zeros((shape.n_trees, 2**level), int)
        place[params["path"][:, 0], params["leaf"] >> (shape.depth - level)] = params["path"][:, level]
        places.append(place)
    return places


def _of_tree(spec: TreeSpec, size: int) -> np.ndarray:
    """Where every tree begins in an array of `size` entries a tree: [P, 1]; a pruned layer is one forest."""
    return np.arange(spec.shape.n_trees)[:, None] * (0 if isinstance(spec, PrunedSpec) else size)


def _unit_rows(places, kept, spec: TreeSpec, layout: Layout) -> np.ndarray:
    """Rows of the kept nodes' units, level by level, in arrays that `layout` describes."""
    rows = [np.zeros(0, int)]
    for level, width in layout.levels:
        first = _of_tree(spec, layout.unit_starts[-1]) + layout.unit_starts[level] + places[level] * width
        rows.append((first[kept[level]][:, None] + np.arange(width)[None]).reshape(-1))
    return np.concatenate(rows)


def _deciding_nodes(places, kept, spec: TreeSpec) -> np.ndarray:
    """Entries of the kept deciding nodes in arrays of one entry a node."""
    layout = layout_of(spec)
    nodes = [
        (_of_tree(spec, layout.node_starts[-1]) + layout.node_starts[level] + places[level])[kept[level]]
        for level in range(spec.shape.depth)
    ]
    return np.concatenate([np.zeros(0, int), *nodes])


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
