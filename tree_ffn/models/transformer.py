"""The decoder: pre-LN transformer whose feed-forward layers are of any kind.

Parameters, one subtree per run of equal layers, each leaf stacked over the
layers of the run:

    embed/{tokens [V,E], positions [context,E]}        ln_f/{scale, bias} [E]
    run_0/{ln_1, ln_2}/{scale, bias}
    run_0/attn/{w_qkv [E,3,H,K], b_qkv [3,H,K], w_out [H,K,E], b_out [E]}
    run_0/ffn/{w_in, b_in, w_out, b_out, ...}          and in "routing": run_0/ffn/{threshold, ...}
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.models.ffn import FFN, update_routing
from tree_ffn.models.spec import FFNSpec, InitSpec, ModelSpec

__all__ = ["Cache", "InitSpec", "KeyValue", "ModelSpec", "Transformer", "unrolled", "update_model_routing"]


class KeyValue(NamedTuple):
    """Keys and values of past positions; stacked over the layers of a run.

    Attributes:
      k: [layers, B, H, M, K], M the positions there is room for.
      v: the same.
    """

    k: jax.Array
    v: jax.Array


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
      runs: keys and values of every run of layers.
      length: int32 scalar, the positions filled so far.
    """

    runs: tuple[KeyValue, ...]
    length: jax.Array


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
        q_BCHK = qkv[:, :, 0]
        k_BHMK, v_BHMK = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in (1, 2))
        if past is not None:
            k_BHMK = jax.lax.dynamic_update_slice(past.k, k_BHMK, (0, 0, start, 0))
            v_BHMK = jax.lax.dynamic_update_slice(past.v, v_BHMK, (0, 0, start, 0))
        out_BCHK = causal_attention(q_BCHK, k_BHMK, v_BHMK, start)
        y_BCE = jnp.einsum("BCHK,HKE->BCE", out_BCHK, w_out_HKE.astype(dtype))
        return y_BCE + b_out_E.astype(dtype)[None, None], None if past is None else KeyValue(k_BHMK, v_BHMK)


def causal_attention(q_BCHK, k_BHMK, v_BHMK, start):
    """softmax(q k^T / sqrt(K)) v over the positions m <= start + c; the softmax is float32."""
    n_queries, n_keys = q_BCHK.shape[1], k_BHMK.shape[2]
    visible_CM = jnp.arange(n_keys)[None, :] <= start + jnp.arange(n_queries)[:, None]
    logits = jnp.einsum("BCHK,BHMK->BHCM", q_BCHK, k_BHMK, preferred_element_type=jnp.float32)
    logits = jnp.where(visible_CM[None, None], logits * q_BCHK.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BCHK.dtype)
    return jnp.einsum("BHCM,BHMK->BCHK", weights, v_BHMK)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    model: ModelSpec
    ffn: FFNSpec

    @nn.compact
    def __call__(self, x_BCE, past: KeyValue | None, start):
        spec = self.model
        attended, past = Attention(spec, name="attn")(LayerNorm(spec, name="ln_1")(x_BCE), past, start)
        x_BCE = x_BCE + attended
        ffn = FFN(
            self.ffn,
            spec.implementation,
            spec.init.w_in,
            spec.init.w_out,
            jnp.dtype(spec.param_dtype),
            name="ffn",
        )
        y_BCE, info = ffn(LayerNorm(spec, name="ln_2")(x_BCE))
        return x_BCE + y_BCE, (info, past)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, computed in float32, returned in x's dtype."""

    model: ModelSpec

    @nn.compact
    def __call__(self, x_BCE):
        param_dtype = jnp.dtype(self.model.param_dtype)
        scale_E = self.param("scale", nn.initializers.ones, x_BCE.shape[-1:], param_dtype)
        bias_E = self.param("bias", nn.initializers.zeros, x_BCE.shape[-1:], param_dtype)
        x = x_BCE.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.model.norm_eps)
        y = x * scale_E.astype(jnp.float32)[None, None] + bias_E.astype(jnp.float32)[None, None]
        return y.astype(x_BCE.dtype)


class Embed(nn.Module):
    """Token and position embeddings; the token table is also the output head."""

    model: ModelSpec

    def setup(self):
        spec = self.model
        normal, param_dtype = nn.initializers.normal(spec.init.embed), jnp.dtype(spec.param_dtype)
        self.tokens = self.param("tokens", normal, (spec.vocab_rows, spec.width), param_dtype)
        self.positions = self.param("positions", normal, (spec.context, spec.width), param_dtype)

    def __call__(self, tokens_BC, start):
        n_positions = tokens_BC.shape[1]
        token_BCE = jnp.take(self.tokens, tokens_BC, axis=0, mode="clip")
        position_CE = jax.lax.dynamic_slice_in_dim(self.positions, start, n_positions)
        return (token_BCE + position_CE[None]).astype(self.model.dtype)

    def logits(self, x_BCE):
        """float32 scores of the V tokens."""
        table = self.tokens.astype(x_BCE.dtype)
        logits = jnp.einsum("BCE,VE->BCV", x_BCE, table, preferred_element_type=jnp.float32)
        return logits[:, :, : self.model.vocab_size]


class Transformer(nn.Module):
    """A decoder language model.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> ffns = (DenseSpec(width=32),) * 2
      >>> spec = ModelSpec(vocab_size=257, context=16, width=8, n_layers=2, n_heads=2, ffns=ffns)
      >>> tokens = jnp.zeros((1, 16), jnp.int32)
      >>> variables = Transformer(spec).init(jax.random.key(0), tokens)
      >>> logits, infos = Transformer(spec).apply(variables, tokens)
      >>> logits.shape, len(infos)
      ((1, 16, 257), 1)
    """

    spec: ModelSpec

    @nn.compact
    def __call__(self, tokens_BC: jax.Array, cache: Cache | None = None, only: jax.Array | None = None):
        """Scores of the next token after every position.

        Args:
          tokens_BC: int32 [B, C], C at most the context; ids below V.
          cache: past positions to attend to; `tokens_BC` follow them.
          only: int32 scalar, the one position to score; None scores all.

        Returns:
          logits float32 [B, C, V] (C = 1 with `only`), and one Info per run of
          layers, each leaf stacked [layers of the run, ...]; with a cache also
          the extended cache.
        """
        spec = self.spec
        start = jnp.int32(0) if cache is None else cache.length
        embed = Embed(spec, name="embed")
        x_BCE = embed(tokens_BC, start)
        layer_class = nn.remat(Layer, prevent_cse=False) if spec.remat else Layer
        infos, new_runs = [], []
        for i, (ffn, length) in enumerate(spec.runs):
            run = nn.scan(
                layer_class,
                variable_axes={"params": 0, "routing": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=length,
            )(spec, ffn, name=f"run_{i}")
            x_BCE, (info, new) = run(x_BCE, None if cache is None else cache.runs[i], start)
            infos.append(info)
            new_runs.append(new)
        if only is not None:
            x_BCE = jax.lax.dynamic_slice_in_dim(x_BCE, only, 1, axis=1)
        logits_BCV = embed.logits(LayerNorm(spec, name="ln_f")(x_BCE))
        if cache is None:
            return logits_BCV, tuple(infos)
        return logits_BCV, tuple(infos), Cache(tuple(new_runs), start + tokens_BC.shape[1])


def update_model_routing(spec: ModelSpec, routing: dict, infos) -> dict:
    """The model's "routing" collection after a step's balancing (see `ffn.update_routing`)."""
    new = dict(routing)
    for i, ((ffn, _), info) in enumerate(zip(spec.runs, infos, strict=True)):
        if f"run_{i}" in routing:
            new[f"run_{i}"] = {"ffn": update_routing(ffn, routing[f"run_{i}"]["ffn"], info)}
    return new


def unrolled(spec: ModelSpec, variables: dict) -> tuple[ModelSpec, dict]:
    """The same model with every layer standing alone: a scan would copy each layer's weights at every step.

    Returns:
      the spec with `scan=False` and the variables with run_0 ... one per layer.
    """
    new = {name: {} for name in variables}
    for collection, runs in variables.items():
        first = 0
        for i, (_, length) in enumerate(spec.runs):
            for j in range(length):
                if f"run_{i}" in runs:
                    one = jax.tree.map(lambda leaf, j=j: leaf[j : j + 1], runs[f"run_{i}"])
                    new[collection][f"run_{first + j}"] = one
            first += length
        new[collection] |= {name: value for name, value in runs.items() if not name.startswith("run_")}
    return dataclasses.replace(spec, scan=False), new
