"""Causal attention: its projections, its cache, and the fused kernels where there are some."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tree_ffn.models.sharded import on_own_part
from tree_ffn.models.spec import ModelSpec
from tree_ffn.tree.meshes import platform

ATTENTION = "attention"  # the name for checkpoint policies of what a kernel's derivative reads
LANES = 128  # numbers in a row of a TPU's memory


class KeyValue(NamedTuple):
    """Keys and values of past positions; stacked over the layers of a run.

    Attributes:
      k: [layers, B, H, M, K], M the positions there is room for.
      v: the same.
    """

    k: jax.Array
    v: jax.Array


class Attention(nn.Module):
    """Causal multi-head attention with biases; reads and extends a cache where one is given."""

    model: ModelSpec

    @nn.compact
    def __call__(self, x_BCE, past: KeyValue | None, start):
        spec, dtype = self.model, x_BCE.dtype
        width, n_heads, head_width = spec.width, spec.n_heads, spec.head_width
        param_dtype = jnp.dtype(spec.param_dtype)
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        in_std, out_std = spec.init.attn_in / width**0.5, spec.init.attn_out / width**0.5
        w_qkv = self.param("w_qkv", normal(in_std), (width, 3, n_heads, head_width), param_dtype)
        b_qkv = self.param("b_qkv", zeros, (3, n_heads, head_width), param_dtype)
        w_out_HKE = self.param("w_out", normal(out_std), (n_heads, head_width, width), param_dtype)
        b_out_E = self.param("b_out", zeros, (width,), param_dtype)

        # The order of the plain matrix product: any other one makes XLA:CPU transpose the weights.
        qkv = jnp.einsum("BCE,EnHK->BCnHK", x_BCE, w_qkv.astype(dtype)) + b_qkv.astype(dtype)[None, None]
        q_BCHK, k_BCHK, v_BCHK = (qkv[:, :, i] for i in range(3))
        if past is None:
            out_BCHK = self_attention(q_BCHK, k_BCHK, v_BCHK)
        else:
            k_BCHK, v_BCHK = _marked(k_BCHK, v_BCHK)
            k, v = jnp.swapaxes(k_BCHK, 1, 2), jnp.swapaxes(v_BCHK, 1, 2)
            past = KeyValue(_written(past.k, k, start), _written(past.v, v, start))
            out_BCHK = causal_attention(q_BCHK, past.k, past.v, start)
        y_BCE = jnp.einsum("BCHK,HKE->BCE", out_BCHK, w_out_HKE.astype(dtype))
        return y_BCE + b_out_E.astype(dtype)[None, None], past


def self_attention(q_BCHK: jax.Array, k_BCHK: jax.Array, v_BCHK: jax.Array) -> jax.Array:
    """`causal_attention` of a sequence to itself, by flash attention where there is a kernel.

    That never stores the C x C scores. cuDNN's, for GPUs, takes 16-bit floats and heads of at most 128
    elements in multiples of 8; JAX's own for TPUs takes sequences of a multiple of 128.

    Args:
      q_BCHK: queries.
      k_BCHK: keys of the same positions.
      v_BCHK: their values.
    """
    length, head_width, dtype = q_BCHK.shape[1], q_BCHK.shape[-1], q_BCHK.dtype
    if platform() == "gpu" and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128:
        return jax.nn.dot_product_attention(q_BCHK, k_BCHK, v_BCHK, is_causal=True, implementation="cudnn")
    if platform() == "tpu" and length % 128 == 0:
        return flash_on_tpus(q_BCHK, k_BCHK, v_BCHK)
    return causal_attention(q_BCHK, jnp.swapaxes(k_BCHK, 1, 2), jnp.swapaxes(v_BCHK, 1, 2), jnp.int32(0))


def flash_on_tpus(q_BCHK: jax.Array, k_BCHK: jax.Array, v_BCHK: jax.Array) -> jax.Array:
    """`self_attention` by JAX's Pallas kernel; under our mesh each device has its own rows and heads.

    Args:
      q_BCHK: queries, C a multiple of 128.
      k_BCHK: keys of the same positions.
      v_BCHK: their values.

    Source: Dao et al. 2022 (arXiv 2205.14135).
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as flash  # a second to import

    length, head_width = q_BCHK.shape[1], q_BCHK.shape[3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = [field.name for field in dataclasses.fields(flash.BlockSizes)]
    blocks = flash.BlockSizes(**{name: 1 if name == "block_b" else block for name in names})

    kernel = functools.partial(
        flash.flash_attention, causal=True, sm_scale=head_width**-0.5, block_sizes=blocks
    )

    def attend(*arrays):
        return jnp.swapaxes(compactly(kernel, *(jnp.swapaxes(array, 1, 2) for array in arrays)), 1, 2)

    return on_own_part(attend, q_BCHK.shape[0], q_BCHK.shape[2])(q_BCHK, k_BCHK, v_BCHK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def compactly(attend: Callable, *arrays_BHCK: jax.Array) -> jax.Array:
    """`attend` of arrays, which saves for its derivative no padding, under the name ATTENTION.

    A TPU fills rows up to 128 numbers, and most heads have fewer: [C, K] is saved as [C K / 128, 128].

    Args:
      attend: of arrays [B, H, C, K] to one of their shape; C is a multiple of 128.
      *arrays_BHCK: its operands.
    """
    return attend(*arrays_BHCK)


def _forward(attend, *arrays_BHCK):
    out_BHCK, derivative = jax.vjp(attend, *arrays_BHCK)

    def kept(leaf):
        leaf = leaf.reshape(*leaf.shape[:2], -1, LANES) if leaf.ndim == 4 else leaf
        return checkpoint_name(leaf, ATTENTION)

    out = kept(out_BHCK)  # once, for the derivative and for the product that follows
    saved = jax.tree.map(lambda leaf: out if leaf is out_BHCK else kept(leaf), derivative)
    return out.reshape(out_BHCK.shape), saved


def _backward(attend, saved, d_out_BHCK):
    restored = lambda leaf: leaf.reshape(d_out_BHCK.shape) if leaf.ndim == 4 else leaf
    return jax.tree.map(restored, saved)(d_out_BHCK)


compactly.defvjp(_forward, _backward)


def causal_attention(q_BCHK, k_BHMK, v_BHMK, start):
    """softmax(q k^T / sqrt(K)) v over the positions m <= start + c; the softmax is float32.

    Args:
      q_BCHK: queries of C positions.
      k_BHMK: keys of M positions.
      v_BHMK: their values.
      start: int32, the position of the first query: a scalar, or [B] where every row has its own.
    """
    n_queries, n_keys = q_BCHK.shape[1], k_BHMK.shape[2]
    last_BHCM = start.reshape(-1, 1, 1, 1) + jnp.arange(n_queries)[None, None, :, None]
    visible_BHCM = jnp.arange(n_keys)[None, None, None] <= last_BHCM
    logits = jnp.einsum("BCHK,BHMK->BHCM", q_BCHK, k_BHMK, preferred_element_type=jnp.float32)
    logits = jnp.where(visible_BHCM, logits * q_BCHK.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BCHK.dtype)
    return jnp.einsum("BHCM,BHMK->BCHK", weights, v_BHMK)


def _marked(k_BCHK, v_BCHK):
    """Keys and values whose overflow reaches only who attends to it: 0 * NaN in the values would reach all.

    Padding behind a prompt may overflow where the prompt does not. Where a value is not finite, the key is
    NaN in its place: a score that is masked is gone.
    """
    is_finite = jnp.isfinite(v_BCHK)
    k_BCHK = jnp.where(is_finite.all(axis=-1, keepdims=True), k_BCHK, jnp.nan)
    return k_BCHK, jnp.where(is_finite, v_BCHK, 0)


def _written(past_BHMK, new_BHCK, start):
    """The cache with new positions from `start` on, which is a scalar or [B]."""
    if start.size == 1:  # one slice is faster than rows that are scattered
        return jax.lax.dynamic_update_slice(past_BHMK, new_BHCK, (0, 0, start.reshape(()), 0))
    row = lambda past_HMK, new_HCK, at: jax.lax.dynamic_update_slice(past_HMK, new_HCK, (0, at, 0))
    return jax.vmap(row)(past_BHMK, new_BHCK, start)
