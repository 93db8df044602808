"""Causal attention: its projections, its cache, and the fused kernel where there is one."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.models.spec import ModelSpec


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
            k, v = jnp.swapaxes(k_BCHK, 1, 2), jnp.swapaxes(v_BCHK, 1, 2)
            past = KeyValue(
                jax.lax.dynamic_update_slice(past.k, k, (0, 0, start, 0)),
                jax.lax.dynamic_update_slice(past.v, v, (0, 0, start, 0)),
            )
            out_BCHK = causal_attention(q_BCHK, past.k, past.v, start)
        y_BCE = jnp.einsum("BCHK,HKE->BCE", out_BCHK, w_out_HKE.astype(dtype))
        return y_BCE + b_out_E.astype(dtype)[None, None], past


def self_attention(q_BCHK: jax.Array, k_BCHK: jax.Array, v_BCHK: jax.Array) -> jax.Array:
    """`causal_attention` of a sequence to itself, fused on GPUs that have the kernel.

    cuDNN's flash attention never stores the C x C scores. It takes 16-bit floats and
    heads of at most 128 elements in multiples of 8.
    """
    head_width, dtype = q_BCHK.shape[-1], q_BCHK.dtype
    fused = dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128
    if fused and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q_BCHK, k_BCHK, v_BCHK, is_causal=True, implementation="cudnn")
    return causal_attention(q_BCHK, jnp.swapaxes(k_BCHK, 1, 2), jnp.swapaxes(v_BCHK, 1, 2), jnp.int32(0))


def causal_attention(q_BCHK, k_BHMK, v_BHMK, start):
    """softmax(q k^T / sqrt(K)) v over the positions m <= start + c; the softmax is float32."""
    n_queries, n_keys = q_BCHK.shape[1], k_BHMK.shape[2]
    visible_CM = jnp.arange(n_keys)[None, :] <= start + jnp.arange(n_queries)[:, None]
    logits = jnp.einsum("BCHK,BHMK->BHCM", q_BCHK, k_BHMK, preferred_element_type=jnp.float32)
    logits = jnp.where(visible_CM[None, None], logits * q_BCHK.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BCHK.dtype)
    return jnp.einsum("BHCM,BHMK->BCHK", weights, v_BHMK)
