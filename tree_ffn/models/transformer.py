"""The decoder: pre-LN transformer whose feed-forward layers are of any kind.

Parameters, one subtree per run of equal layers, each leaf stacked over the
layers of the run:

    embed/{tokens [V,E], positions [context,E]}        ln_f/{scale, bias} [E]
    embed/head [V,E]                                   where it is not the token table
    run_0/{ln_1, ln_2}/{scale, bias}
    run_0/attn/{w_qkv [E,3,H,K], b_qkv [3,H,K], w_out [H,K,E], b_out [E]}
    run_0/ffn/{w_in, b_in, w_out, b_out, ...}          and in "routing": run_0/ffn/{threshold, ...}
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.models.attention import ATTENTION, Attention, KeyValue
from tree_ffn.models.ffn import FFN, balanced, balances
from tree_ffn.models.sharded import by_rows
from tree_ffn.models.spec import FFNSpec, InitSpec, ModelSpec
from tree_ffn.tree.meshes import platform
from tree_ffn.tree.products import CHOICE, PRODUCT, float32_product

__all__ = [
    "Cache",
    "InitSpec",
    "ModelSpec",
    "Transformer",
    "logits_of",
    "output_of",
    "scores",
    "unrolled",
    "update_model_routing",
]


# What layers hold and sow, stacked over the layers of a run; the first two are a model's own.
COLLECTIONS = ("params", "routing", "intermediates", "leak", "beside", "gap")


def _saving(*names: str):
    """A policy that saves products with weights, and what has these names."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*names)
    )


# What a layer's backward pass finds saved, by `ModelSpec.remat`: of "full", its input. On TPUs, whose loop
# over layers stores all that is saved, "none" is all products, attention and choices: activations and norms
# between them are computed again.
SAVED = {"none": _saving(PRODUCT, CHOICE, ATTENTION), "dots": _saving(PRODUCT), "full": None}

# Score of a row that is no token: its probability is 0 in float32, and no infinity meets a gradient.
NEVER = -1e30


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
      runs: keys and values of every run of layers.
      length: int32 scalar, the positions filled so far; or [B], where the rows
        differ.
    """

    runs: tuple[KeyValue, ...]
    length: jax.Array


class Layer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    model: ModelSpec
    ffn: FFNSpec

    @nn.compact
    def __call__(self, x_BCE, past: KeyValue | None, start, tokens_BC):
        spec = self.model
        attended, past = Attention(spec, name="attn")(LayerNorm(spec, name="ln_1")(x_BCE), past, start)
        x_BCE = by_rows(x_BCE + attended)
        ffn = FFN(
            self.ffn,
            spec.implementation,
            spec.init.w_in,
            spec.init.w_out,
            jnp.dtype(spec.param_dtype),
            name="ffn",
        )
        y_BCE, info = ffn(LayerNorm(spec, name="ln_2")(x_BCE), tokens_BC)
        return by_rows(x_BCE + y_BCE), (info, past)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, computed in float32, returned in x's dtype.

    NaN where var overflows. Training keeps x alone, and norms it again in the backward pass: between lie
    three float32 arrays of x's size.
    """

    model: ModelSpec

    @nn.compact
    def __call__(self, x_BCE):
        param_dtype = jnp.dtype(self.model.param_dtype)
        scale_E = self.param("scale", nn.initializers.ones, x_BCE.shape[-1:], param_dtype)
        bias_E = self.param("bias", nn.initializers.zeros, x_BCE.shape[-1:], param_dtype)

        def normed(x_BCE, scale_E, bias_E):
            x = x_BCE.astype(jnp.float32)
            x = x - x.mean(axis=-1, keepdims=True)
            var = jnp.square(x).mean(axis=-1, keepdims=True)
            # 1 / sqrt(inf) is 0: what overflows would come out as the same plausible numbers for every token.
            x = x * jnp.where(jnp.isfinite(var), jax.lax.rsqrt(var + self.model.norm_eps), jnp.nan)
            y = x * scale_E.astype(jnp.float32)[None, None] + bias_E.astype(jnp.float32)[None, None]
            return y.astype(x_BCE.dtype)

        return jax.checkpoint(normed, prevent_cse=layers_a_turn(self.model) > 1)(x_BCE, scale_E, bias_E)


class Embed(nn.Module):
    """Token and position embeddings, and the output head, which is mostly the token table."""

    model: ModelSpec

    def setup(self):
        spec = self.model
        normal, param_dtype = nn.initializers.normal(spec.init.embed), jnp.dtype(spec.param_dtype)
        self.tokens = self.param("tokens", normal, (spec.vocab_rows, spec.width), param_dtype)
        self.positions = self.param("positions", normal, (spec.max_seq_len, spec.width), param_dtype)
        self.head = self.tokens
        if not spec.tied_head:
            self.head = self.param("head", normal, (spec.vocab_rows, spec.width), param_dtype)

    def __call__(self, tokens_BC, start):
        n_positions = tokens_BC.shape[1]
        token_BCE = jnp.take(self.tokens, tokens_BC, axis=0, mode="clip")
        if start.ndim == 0:
            position_BCE = jax.lax.dynamic_slice_in_dim(self.positions, start, n_positions)[None]
        else:
            at_BC = start[:, None] + jnp.arange(n_positions)[None]
            position_BCE = jnp.take(self.positions, at_BC, axis=0, mode="clip")
        # Added in float32, whatever they are stored in.
        x_BCE = token_BCE.astype(jnp.float32) + position_BCE.astype(jnp.float32)
        return by_rows(x_BCE.astype(self.model.dtype))

    def logits(self, x_BCE):
        return scores(self.model, self.head.astype(x_BCE.dtype), x_BCE)


class Transformer(nn.Module):
    """A decoder language model.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> ffns = (DenseSpec(width=32),) * 2
      >>> spec = ModelSpec(vocab_size=257, max_seq_len=16, width=8, n_layers=2, n_heads=2, ffns=ffns)
      >>> tokens = jnp.zeros((1, 16), jnp.int32)
      >>> variables = jax.jit(Transformer(spec).init)(jax.random.key(0), tokens)
      >>> logits, infos = jax.jit(Transformer(spec).apply)(variables, tokens)
      >>> logits.shape, len(infos)
      ((1, 16, 257), 1)
    """

    spec: ModelSpec

    @nn.compact
    def __call__(
        self,
        tokens_BC: jax.Array,
        cache: Cache | None = None,
        only: jax.Array | None = None,
        states: bool = False,
    ):
        """Scores of the next token after every position.

        Args:
          tokens_BC: int32 [B, C], C at most the context; ids below V.
          cache: past positions to attend to; `tokens_BC` follow them.
          only: int32, the positions to score: one for all rows (a scalar), or K of each row [B, K];
            None scores all.
          states: return x_BCE, what the last norm reads, in place of logits; `logits_of` turns any part
            of it into scores.

        Returns:
          logits float32 [B, C, V] (1 or K of the C with `only`), and
          one Info per run of layers, each leaf stacked [layers of the run, ...]; with a cache also
          the extended cache.
        """
        spec = self.spec
        start = jnp.int32(0) if cache is None else cache.length
        embed = Embed(spec, name="embed")
        x_BCE = embed(tokens_BC, start)
        layer_class = Layer
        if spec.remat != "none" or platform() == "tpu":
            # Only a loop's border keeps a compiler from merging what is recomputed with what was first.
            layer_class = nn.remat(Layer, prevent_cse=layers_a_turn(spec) > 1, policy=SAVED[spec.remat])
        infos, new_runs = [], []
        for i, (ffn, length) in enumerate(spec.runs):
            run = nn.scan(
                layer_class,
                variable_axes=dict.fromkeys(COLLECTIONS, 0),
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=length,
                unroll=min(layers_a_turn(spec), length),
            )(spec, ffn, name=f"run_{i}")
            x_BCE, (info, new) = run(x_BCE, None if cache is None else cache.runs[i], start, tokens_BC)
            infos.append(info)
            new_runs.append(new)
        if only is not None and only.ndim == 0:
            x_BCE = jax.lax.dynamic_slice_in_dim(x_BCE, only, 1, axis=1)
        elif only is not None:
            x_BCE = jnp.take_along_axis(x_BCE, only[..., None], axis=1, mode="clip")
        if states:
            found = x_BCE
        else:
            found = embed.logits(LayerNorm(spec, name="ln_f")(x_BCE))[:, :, : spec.vocab_size]
        if cache is None:
            return found, tuple(infos)
        return found, tuple(infos), Cache(tuple(new_runs), start + tokens_BC.shape[1])


def layers_a_turn(spec: ModelSpec) -> int:
    """Layers that one turn of the loop over layers holds, on the platform of the current mesh."""
    return spec.unroll or (1 if platform() == "tpu" else 12)


def logits_of(spec: ModelSpec, params: dict, x_BCE: jax.Array) -> jax.Array:
    """Scores of states that `Transformer` returned with `states`: float32 [B, C, V rounded up].

    The table's rows beyond V stay, scored `NEVER`: who reads scores of V tokens cuts them off, which copies
    all, and a loss need not.

    Args:
      spec: the model.
      params: the model's, of which `ln_f` and `embed` are read.
      x_BCE: what the last norm reads.
    """
    return scores(spec, *output_of(spec, params, x_BCE))


def output_of(spec: ModelSpec, params: dict, x_BCE: jax.Array):
    """The operands of `scores`: the output head, and what it reads of states.

    Args:
      spec: the model.
      params: the model's, of which `ln_f` and `embed` are read.
      x_BCE: what `Transformer` returned with `states`.

    Returns:
      [R, E] in the model's dtype, R the V tokens rounded up; and [B, C, E].
    """
    head_RE = params["embed"]["tokens" if spec.tied_head else "head"].astype(spec.dtype)
    return head_RE, LayerNorm(spec).apply({"params": params["ln_f"]}, x_BCE)


def scores(spec: ModelSpec, head_RE: jax.Array, y_BCE: jax.Array) -> jax.Array:
    """float32 scores [B, C, R] of all rows of the head; those beyond the V tokens are `NEVER`.

    Args:
      spec: the model.
      head_RE: the head, in the dtype of y.
      y_BCE: what it reads: both are `output_of`'s.
    """
    logits_BCR = float32_product(y_BCE, head_RE)
    if spec.vocab_rows == spec.vocab_size:
        return logits_BCR
    row = jax.lax.broadcasted_iota(jnp.int32, logits_BCR.shape, 2)
    return jnp.where(row < spec.vocab_size, logits_BCR, NEVER)


def update_model_routing(spec: ModelSpec, routing: dict, counts) -> dict:
    """The model's "routing" collection after a step's balancing (see `ffn.update_routing`).

    Args:
      spec: the model.
      routing: its collection before.
      counts: visits of the step, one int32 [layers, P, J] a run of layers.
    """
    new = dict(routing)
    for i, ((ffn, _), visits) in enumerate(zip(spec.runs, counts, strict=True)):
        if balances(ffn):
            new[f"run_{i}"] = {"ffn": balanced(ffn, routing[f"run_{i}"]["ffn"], visits)}
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
