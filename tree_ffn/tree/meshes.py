"""Layers under a mesh of the user, whose devices need not be this machine's."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from tree_ffn.tree.info import Info


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the current mesh's devices are, JAX's default where there is no mesh.

    A program may be compiled ahead of time for devices that this machine lacks.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def units_are_split() -> bool:
    """Whether the current mesh has an axis `model` of several devices, over which units are divided."""
    return jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1


def partitioned(layer: Callable, x_TE: jax.Array) -> Callable:
    """`layer`, a function of arrays to (y_TE, Info), as it can be traced under the current mesh.

    Where axes are explicit, every array's type says how it is split, and no type can say how rows that are
    read by index are. Inside the layer that is left to the partitioner; y and the choices are split as x is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return layer
    over = jax.typeof(x_TE).sharding.spec
    return jax.sharding.auto_axes(layer, out_sharding=(over, Info(PartitionSpec(over[0]))))
