"""A loss over positions whose scores are computed, and dropped, a chunk of positions at a time.

Scores of all tokens at every position would be the largest array of a training step: 6.6 GB in float32 for
32,768 positions and 50,272 tokens, and as much for their gradient. The gradient of a sum is known up to its
factor while the sum is computed. So a chunk's gradient is taken with its loss: no scores outlive their
chunk, and none are computed twice.

    loss = sum over chunks i of f(y_i head^T),   d loss / d head = sum over chunks i of f'(y_i head^T)^T y_i

Source: Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tree_ffn.models.sharded import mesh_axes
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import scores

# Scores of a chunk on one device: 512 MiB in float32. A step that has fewer is left whole: a loop holds the
# head's gradient of all tokens beside them.
CHUNK = 2**27

# (scores [B, c, R], given [B, c, ...], fixed) to (their sum, a number to tell of every position [B, c]).
Loss = Callable[[jax.Array, Any, Any], tuple[jax.Array, jax.Array]]


def summed(loss: Loss, spec: ModelSpec, head_RE: jax.Array, y_BCE: jax.Array, given, fixed=()):
    """Sum of a loss over all positions, and what it tells of each; only the sum has a gradient.

    Args:
      loss: of a chunk of positions. Positions that fill up the last chunk are given zeros, and must add 0.
      spec: the model.
      head_RE: its output head, of `transformer.output_of`. It has a gradient.
      y_BCE: what the head reads; the same.
      given: arrays [B, C, ...], which the loss reads of each position.
      fixed: arrays that it reads at every position.

    Returns:
      a float32 scalar, and [B, C].
    """
    if _Division.of(y_BCE, head_RE).chunks > 1:
        return _summed(loss, spec, head_RE, y_BCE, given, fixed)
    total, told_BC = loss(scores(spec, head_RE, y_BCE), given, fixed)
    return total, jax.lax.stop_gradient(told_BC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(loss, spec, head_RE, y_BCE, given, fixed):
    division, head_RE = _Division.of(y_BCE, head_RE), _whole(head_RE)
    of_group = jax.vmap(lambda y, given: loss(scores(spec, head_RE, y), given, fixed))
    _, (sums, told) = jax.lax.scan(
        lambda _, chunk: (None, of_group(*chunk)), None, division.split((y_BCE, given))
    )
    return sums.sum(), division.joined(told)


def _forward(loss, spec, head_RE, y_BCE, given, fixed):
    division, head_RE = _Division.of(y_BCE, head_RE), _whole(head_RE)
    score = lambda head_RE, y, given: loss(scores(spec, head_RE, y), given, fixed)
    of_group = jax.vmap(jax.value_and_grad(score, (0, 1), has_aux=True), (None, 0, 0))

    def one(d_head_GRE, chunk):
        (sums, told), (new_GRE, d_y) = of_group(head_RE, *chunk)
        return _by_group(d_head_GRE + new_GRE.astype(jnp.float32)), (sums, told, d_y)

    zeros = _by_group(jnp.zeros((division.groups, *head_RE.shape), jnp.float32))
    d_head_GRE, (sums, told, d_y) = jax.lax.scan(one, zeros, division.split((y_BCE, given)))
    saved = _stored(d_head_GRE.sum(axis=0).astype(head_RE.dtype)), division.joined(d_y)
    return (sums.sum(), division.joined(told)), saved


def _backward(loss, spec, saved, cotangents):
    del loss, spec
    factor, _ = cotangents
    scaled = lambda leaf: (factor * leaf.astype(jnp.float32)).astype(leaf.dtype)
    return *map(scaled, saved), None, None


_summed.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Division:
    """B rows in groups, one a device of the axis "data", and C positions in chunks of equal length.

    Each group has a sum of its own until the end: devices would else add up the head's gradient after
    every chunk.
    """

    rows: int
    positions: int
    groups: int
    chunks: int

    @classmethod
    def of(cls, y_BCE, head_RE) -> "_Division":
        axes, (rows, positions) = mesh_axes(), y_BCE.shape[:2]
        longest = max(1, CHUNK * axes["data"] * axes["model"] // (rows * head_RE.shape[0]))
        groups = axes["data"] if rows % axes["data"] == 0 else 1
        return cls(rows, positions, groups, chunks=-(-positions // longest))

    def split(self, arrays):
        """Arrays [B, C, ...] as [chunks, groups, B / groups, c, ...], filled up by zeros."""
        length = -(-self.positions // self.chunks)

        def one(array):
            missing = self.chunks * length - self.positions
            array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
            shape = (self.groups, self.rows // self.groups, self.chunks, length)
            return jnp.moveaxis(array.reshape(*shape, *array.shape[2:]), 2, 0)

        return jax.tree.map(one, arrays)

    def joined(self, array):
        """The inverse, of one array."""
        array = jnp.moveaxis(array, 0, 2)
        return array.reshape(self.rows, -1, *array.shape[4:])[:, : self.positions]


def _by_group(array_GRE):
    """Split over "data" by its groups; how the mesh splits the rest is the partitioner's."""
    if mesh_axes()["data"] == 1 or array_GRE.shape[0] == 1:
        return array_GRE
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(array_GRE, PartitionSpec("data", free, free))


def _stored(d_head_RE):
    """The head's gradient as the head is stored: a part on each device, all through the backward pass."""
    return _split(d_head_RE, "data" if d_head_RE.shape[1] % mesh_axes()["data"] == 0 else None)


def _whole(head_RE):
    """The head as every device multiplies it, which may store a part: gathered before the loop, once."""
    return _split(head_RE, None)


def _split(array_RE, width_over: str | None):
    """An array of the head's shape: its rows over "model" where they divide, its width as said."""
    axes = mesh_axes()
    if axes["data"] == 1:
        return array_RE
    over_model = "model" if array_RE.shape[0] % axes["model"] == 0 else None
    return jax.lax.with_sharding_constraint(array_RE, PartitionSpec(over_model, width_over))
