"""The gradient of a step in microbatches, and how often devices exchange something for it.

Weights are stored in parts, over the mesh's axis "data" (see `sharding`). There are two ways to compute:

- `microbatch`: a layer's weights are gathered when it is computed, and its gradients are summed into the
  parts, in every microbatch anew. The partitioner does so by itself.
- `step`: each device gathers all weights before the first microbatch, in the precision in which they are
  multiplied, and sums the gradients of its own rows in float32. After the last microbatch the sums of all
  devices are added into the parts. What is sent does not grow with the microbatches. A device holds the
  weights, one gradient and the sums of the whole model meanwhile: 8 bytes a parameter in bfloat16, 12 in
  float32.

Source: `step` is the first stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), `microbatch` its third.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tree_ffn.models.sharded import mesh_axes
from tree_ffn.training.sharding import path_name, spec_of

SYNCS = ("step", "microbatch")

# Weights that layers cast to the activations' dtype before they multiply: test_gradients compares both.
MULTIPLIED = re.compile(r"(attn/w_(qkv|out)|ffn/w_(in|out|router))$")


def gradients(
    loss: Callable, params: dict, batch: jax.Array, *, dtype, microbatches: int = 1, sync: str = "step"
):
    """The mean gradient of a batch, its mean cross-entropy, and its counts.

    Args:
      loss: of some rows: (params, rows) to (their mean loss, (their mean cross-entropy, their counts)).
      params: what is trained.
      batch: int32 [B, C + 1].
      dtype: in which layers multiply.
      microbatches: divide B; so many parts of the batch are computed one after another.
      sync: one of SYNCS. Where there is one microbatch, or one device along "data", there is one way.
    """
    n_devices = mesh_axes()["data"]
    once = (
        sync == "step" and n_devices > 1 and microbatches > 1 and len(batch) % (microbatches * n_devices) == 0
    )
    if once:
        grads, nll, counts = _added_up_once(loss, params, batch, microbatches, dtype)
    else:
        grads, nll, counts = _sums(loss, params, batch, microbatches)
    parts = microbatches * (n_devices if once else 1)
    return *jax.tree.map(lambda total: total / parts, (grads, nll)), counts


def _sums(loss, params, batch, microbatches: int):
    """Of all microbatches; inside a split over "data", of those of a device's own rows."""
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        (_, (nll, counts)), grads = grad_fn(params, batch)
        return grads, nll, counts

    # Rows a, a + n, a + 2n, ... are microbatch a: every device keeps its own rows.
    micro = batch.reshape(-1, microbatches, batch.shape[1]).swapaxes(0, 1)

    def one(sums, rows):
        (_, (nll, counts)), grads = grad_fn(params, rows)
        add = lambda total, one: total + one.astype(total.dtype)
        return jax.tree.map(add, sums, (grads, nll, counts)), None

    _, (nll, counts) = jax.eval_shape(loss, params, micro[0])
    empty = lambda leaf, dtype=None: jnp.zeros(leaf.shape, dtype or leaf.dtype)
    sums = jax.tree.map(lambda leaf: empty(leaf, jnp.float32), params), *jax.tree.map(empty, (nll, counts))
    return jax.lax.scan(one, sums, micro)[0]


def _added_up_once(loss, params, batch, microbatches: int, dtype):
    """Sums of all microbatches of all devices, by `sync="step"`."""
    mesh = jax.sharding.get_abstract_mesh()
    stored = lambda path, leaf: spec_of(path_name(path), leaf.shape, mesh)
    specs = jax.tree_util.tree_map_with_path(stored, params)
    whole = jax.tree_util.tree_map_with_path(functools.partial(_whole, dtype=dtype), params, specs)

    def of_own_rows(params, rows):
        grads, *others = _sums(loss, params, rows, microbatches)
        return jax.tree.map(lambda leaf: leaf[None], grads), *jax.lax.psum(others, "data")

    # Pallas's kernels for TPUs are refused where any axis is left to the partitioner.
    alone = {name for name, size in mesh.shape.items() if size == 1}
    grads, nll, counts = jax.shard_map(
        of_own_rows,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        axis_names={"data"} | alone,
        check_vma=False,  # with its checks, the gradient of what all devices share is summed where it arises
    )(whole, batch)
    return jax.tree.map(_in_parts, grads, specs), nll, counts


def _whole(path, leaf: jax.Array, spec: PartitionSpec, dtype) -> jax.Array:
    """A weight as layers multiply it, and as "model" alone splits it."""
    if MULTIPLIED.search(path_name(path)):
        leaf = leaf.astype(dtype)
    return jax.lax.with_sharding_constraint(leaf, _without_data(spec))


def _in_parts(leaf_G: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum of what the devices along "data" have, [G, ...]: to each its part, as `spec` says."""
    axis = next((axis for axis, over in enumerate(spec) if over == "data"), None)

    def add(leaf_G):
        if axis is None:
            return jax.lax.psum(leaf_G[0], "data")
        return jax.lax.psum_scatter(leaf_G[0], "data", scatter_dimension=axis, tiled=True)

    whole = _without_data(spec)
    out = whole if axis is None else spec
    return jax.shard_map(add, in_specs=PartitionSpec("data", *whole), out_specs=out)(leaf_G)


def _without_data(spec: PartitionSpec) -> PartitionSpec:
    """Of what both axes split along one dimension, each device has all."""
    return PartitionSpec(*("model" if over == "model" else None for over in spec))
