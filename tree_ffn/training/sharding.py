"""Where arrays live: one mesh of two axes, and one strict table for parameters.

The mesh has the axes "data" (batches are split over it) and "model" (weights
are). Weights and the optimizer's moments are split over "data" too, along the
width E: a layer's are gathered when it is computed, and its gradients summed
into the parts (fully sharded data parallelism; Rajbhandari et al. 2020, arXiv
1910.02054). For that a partitioner must be told that activations stay split by
rows (`models.sharded.by_rows`). `jax.jit` with these shardings is all there is;
only where a step has several microbatches may devices do so once (`gradients`).
On one device the same code runs with a 1 x 1 mesh.
"""

import dataclasses
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from tree_ffn.errors import InputError, check_positive_int

BOTH = ("data", "model")

# (regex on the path of a leaf, its PartitionSpecs in order of preference). The
# first row that matches a path is its row, and the first spec whose axes divide
# the leaf's dimensions is taken. A path without a row, and a leaf that none of
# its row's specs fits, are errors. The leading axis of everything inside a run
# is the layer. Optimizer moments are sharded like their parameter, whose path
# is the end of their own.
RULES: tuple[tuple[str, tuple[PartitionSpec, ...]], ...] = (
    # Trees [layers, P, U, E], experts [layers, X, W, E]: whole ones over "model", each device has its own;
    # few wide trees are spread for storage, over both axes. Dense layers and pruned trees [layers, F, E].
    (
        r"ffn/w_(in|out)$",
        (
            P(None, "model", None, "data"),
            P(None, None, None, BOTH),
            P(None, "model", "data"),
            P(None, None, BOTH),
            P(None, "model"),
            P(),
        ),
    ),
    (r"ffn/w_router$", (P(None, None, "data"), P())),
    (r"ffn/router/w$", (P(None, "model", None, "data"), P(None, None, None, "data"), P(None, "model"), P())),
    (r"ffn/(b_in|threshold)$", (P(None, "model"), P())),
    (r"ffn/(b_out|b_router|selection_bias|salt)$", (P(),)),
    (r"ffn/(child|path|leaf|kept_row)$", (P(),)),  # of pruned layers
    # Heads over "model".
    (r"attn/w_qkv$", (P(None, "data", None, "model"), P(None, "data"), P(None, None, None, "model"), P())),
    (r"attn/b_qkv$", (P(None, None, "model"), P())),
    (r"attn/w_out$", (P(None, "model", None, "data"), P(None, None, None, "data"), P(None, "model"), P())),
    (r"attn/b_out$", (P(),)),
    # The vocabulary over "model" (model.vocab_multiple makes it divide).
    (r"embed/(tokens|head)$", (P("model", "data"), P(None, "data"), P("model"), P())),
    (r"embed/positions$", (P(None, "data"), P())),
    (r"((ln_1|ln_2|ln_f)/(scale|bias)|step|count|window|made|skipped|in_a_row)$", (P(),)),
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices do what (see `make_mesh`).

    Attributes:
      data: devices that split the batch; -1: all that `model` leaves.
      model: devices that split weights, trees and experts; -1: all that `data` leaves.
    """

    data: int = -1
    model: int = 1


def make_mesh(data: int = -1, model: int = 1, devices=None) -> Mesh:
    """Mesh of shape (data, model) with automatic axes.

    Args:
      data: devices that split the batch; -1 takes all that `model` leaves.
      model: devices that split weights; -1 takes all that `data` leaves.
      devices: to choose from, all of this job's by default. The first
        data x model of them are used.

    Raises:
      InputError: the devices do not suffice, or do not divide.

    Example:
      >>> make_mesh(data=1, model=1).shape_tuple
      (('data', 1), ('model', 1))
    """
    devices = jax.devices() if devices is None else devices
    data, model = mesh_shape(data, model, len(devices))
    used = devices[: data * model]
    return jax.make_mesh((data, model), BOTH, axis_types=(AxisType.Auto,) * 2, devices=used)


def mesh_shape(data: int, model: int, n_devices: int) -> tuple[int, int]:
    """The numbers of `make_mesh`, none of them -1.

    Args:
      data: as in `make_mesh`.
      model: as in `make_mesh`.
      n_devices: to choose from.

    Raises:
      InputError: the devices do not suffice, or do not divide.

    Example:
      >>> mesh_shape(-1, 2, 8)
      (4, 2)
    """
    for name, size in (("data", data), ("model", model)):
        if size != -1:
            check_positive_int(f"mesh.{name}", size)
    said = f"mesh: data={data}, model={model} does not fit {n_devices} devices"
    if data == model == -1:
        raise InputError(f"{said}; only one of the two may be -1.")
    if -1 in (data, model) and n_devices % max(data, model):
        raise InputError(f"{said}; their number must be a multiple of {max(data, model)}.")
    if data * model > n_devices:
        raise InputError(f"{said}; use at most {n_devices} in all, or -1 for what is left.")
    left = n_devices // -(data * model)
    return (left if data == -1 else data), (left if model == -1 else model)


def path_name(path) -> str:
    """`params/run_0/ffn/w_in` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fits(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether the mesh axes of `spec` divide the dimensions of `shape`."""
    if len(spec) > len(shape):
        return False
    for size, axes in zip(shape, spec):
        names = (axes,) if isinstance(axes, str) else (axes or ())
        if size % int(np.prod([mesh.shape[name] for name in names])):
            return False
    return True


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> PartitionSpec:
    """PartitionSpec of one leaf by the table.

    Args:
      name: path of the leaf, parts joined by "/".
      shape: its shape.
      mesh: the mesh whose axis sizes decide what divides.
      rules: (regex, specs in order of preference).

    Raises:
      KeyError: no rule matches `name`, or none of the rule's specs fits.
    """
    for pattern, specs in rules:
        if re.search(pattern, name):
            for spec in specs:
                if _fits(spec, shape, mesh):
                    return spec
            raise KeyError(
                f"{name} of shape {shape} fits no spec of the rule {pattern!r} on {dict(mesh.shape)}"
            )
    raise KeyError(f"no rule of RULES matches {name}")


def shardings_for(tree, mesh: Mesh, rules=RULES):
    """Tree of NamedSharding like `tree` (arrays or shapes), by the table.

    Args:
      tree: arrays or shapes.
      mesh: where they will be.
      rules: the table, as `RULES`.
    """

    def sharding(path, leaf):
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(shapes, mesh: Mesh, rules=RULES):
    """Tree of ShapeDtypeStruct like `shapes`, each with its sharding by the table.

    Args:
      shapes: tree of arrays or shapes.
      mesh: where they will be.
      rules: the table, as `RULES`.
    """
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(put, shapes, shardings_for(shapes, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches [B, ...]: split over "data"."""
    return NamedSharding(mesh, P("data"))


def filled_up(batch: np.ndarray, mesh: Mesh, size: int = 0) -> np.ndarray:
    """A batch [B, ...] with its rows repeated at the end: at least `size` rows, as many on every device.

    Args:
      batch: at least one row.
      mesh: its axis "data" divides the rows.
      size: least number of rows; 0: as many as there are.
    """
    devices = mesh.shape["data"]
    size = -(-max(size, len(batch)) // devices) * devices
    return np.resize(batch, (size, *batch.shape[1:]))


def rows_here(mesh: Mesh, size: int, process: int | None = None) -> np.ndarray:
    """Which rows of a batch the devices of a process hold, ascending.

    Args:
      mesh: where the batch goes.
      size: rows of the whole batch.
      process: its number; by default that of this process.
    """
    process = jax.process_index() if process is None else process
    held = batch_sharding(mesh).devices_indices_map((size,))
    rows = [np.arange(size)[index] for device, index in held.items() if device.process_index == process]
    return np.unique(np.concatenate(rows))


def put_rows(rows: np.ndarray, here: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
    """The rows of a batch that this process holds, as its part of one array [B, ...] over the mesh.

    Args:
      rows: [len(here), ...].
      here: which those are, as `rows_here`.
      size: B.
      mesh: its axis "data" divides B.
    """

    def of_device(index):
        start, stop, _ = index[0].indices(size)
        first = np.searchsorted(here, start)
        return rows[first : first + stop - start]

    return jax.make_array_from_callback((size, *rows.shape[1:]), batch_sharding(mesh), of_device)


def put_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A whole batch [B, ...] as one array over the mesh; a process sends only its own rows."""
    return put_rows(batch, np.arange(len(batch)), len(batch), mesh)
