"""A layer of trees on a mesh: who walks which tree for which token.

Paths read rows that depend on the data, which a partitioner splits badly; so under
a mesh with axes "data" or "model" each device walks its own part inside
`jax.shard_map`. Other layers, and meshes with explicit axes, are left to the partitioner.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from tree_ffn.tree import Info, PrunedSpec, TreeSpec, tree_ffn
from tree_ffn.tree.path.layer import check_fit, finish, sum_of_paths
from tree_ffn.tree.path.pruned import STRUCTURE

# Leaves of the trees; their first axis is P, but not in a pruned layer.
TREE_NAMES = ("w_in", "b_in", "w_out", "threshold", "router", *STRUCTURE)


def sharded_tree_ffn(params: dict, x_TE: jax.Array, spec: TreeSpec, implementation: str | None = None):
    """`tree_ffn`, split over the mesh that `jax.set_mesh` made current.

    - P divisible by the model axis: tokens go over "data", whole trees over
      "model"; each device sums its own trees and one sum over "model" joins them.
    - Otherwise (few wide trees, or pruned ones, which differ in size): tokens go over both axes and every
      device gathers the weights, which are sharded for storage only.

    Tokens that an axis does not divide are not split over it. Without a mesh,
    or with one device, this is `tree_ffn`.

    Args:
      params: of the whole layer.
      x_TE: all tokens.
      spec: the layer.
      implementation: as of `tree_ffn`; None: chosen by rule.

    Returns:
      y_TE and Info(leaf_TP).
    """
    axes = mesh_axes()
    if axes["data"] * axes["model"] == 1:
        return tree_ffn(params, x_TE, spec, implementation)
    check_fit(params, x_TE, spec)
    n_tokens, n_trees = x_TE.shape[0], spec.shape.n_trees
    model = axes["model"]
    by_trees = model > 1 and n_trees % model == 0 and not isinstance(spec, PrunedSpec)
    over = tuple(name for name in (("data",) if by_trees else ("data", "model")) if axes[name] > 1)
    while over and n_tokens % _size(axes, over):
        over = over[:-1]
    trees_over = "model" if by_trees else None
    local_shape = dataclasses.replace(spec.shape, n_trees=n_trees // model) if by_trees else spec.shape
    local_spec = dataclasses.replace(spec, shape=local_shape)

    def walk(params, x_TE):
        s_TE, leaf_TP = sum_of_paths(params, x_TE, local_spec, implementation)
        return s_TE[None], leaf_TP

    # Partial sums leave as [model, T, E] and are added outside: the partitioner
    # makes that one all-reduce, and its transpose costs no communication.
    s_MTE, leaf_TP = jax.shard_map(
        walk,
        in_specs=(PartitionSpec(trees_over), PartitionSpec(over or None)),
        out_specs=(PartitionSpec(trees_over, over or None), PartitionSpec(over or None, trees_over)),
        axis_names=_free_axes(),
    )({name: params[name] for name in TREE_NAMES if name in params}, x_TE)
    return finish(params, s_MTE.sum(axis=0), spec), Info(leaf_TP)


def by_rows(x_BCE: jax.Array) -> jax.Array:
    """Activations whose rows the current mesh splits over "data", and nothing else; as they are without one.

    Weights are split along the width they are multiplied with. Left alone a partitioner splits activations
    so too, and adds up partial products of all tokens.
    """
    n = mesh_axes()["data"]
    if n == 1 or x_BCE.shape[0] % n:
        return x_BCE
    return jax.lax.with_sharding_constraint(x_BCE, PartitionSpec("data"))


def on_own_part(attend: Callable, n_rows: int, n_heads: int) -> Callable:
    """A function of arrays [B, C, H, K] that no partitioner can split: on every device of its rows and heads.

    Args:
      attend: of arrays to one of the same shape.
      n_rows: B, which "data" splits where it divides.
      n_heads: H, likewise over "model".
    """
    axes = mesh_axes()
    rows, heads = (
        name if axes[name] > 1 and n % axes[name] == 0 else None
        for name, n in (("data", n_rows), ("model", n_heads))
    )
    if axes["data"] * axes["model"] == 1:
        return attend
    part = PartitionSpec(rows, None, heads)
    return jax.shard_map(attend, in_specs=part, out_specs=part, axis_names=_free_axes(), check_vma=False)


def mesh_axes() -> dict[str, int]:
    """Sizes of "data" and "model" in the current mesh; 1 without one, of an axis that is split already, and
    where axes are explicit."""
    sizes, free = jax.sharding.get_abstract_mesh().shape, _free_axes()
    return {name: sizes[name] if name in free else 1 for name in ("data", "model")}


def _free_axes() -> set[str]:
    """Axes of the current mesh that a partitioner divides; none where some are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit in mesh.axis_types:
        return set()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}


def _size(axes: dict[str, int], names) -> int:
    size = 1
    for name in names:
        size *= axes[name]
    return size
