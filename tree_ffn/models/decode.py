"""Text from a model: key-value cache, one compiled step, sampling."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.models.attention import KeyValue
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Cache, Transformer, unrolled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its scores.

    Attributes:
      greedy: take the likeliest; the others are then not read.
      temperature: scores are divided by it.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens until their probabilities reach top_p.

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(
                f"temperature: {self.temperature!r} is not allowed; use a number above 0 (or greedy)."
            )
        check_positive_int("top_k", self.top_k, least=0)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r} is not allowed; use a number above 0, at most 1.")


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row: int32 [B].

    Args:
      logits_BV: float32 [B, V].
      key: a typed PRNG key; `greedy` does not read it.
      sampling: the rule. top_k is applied before top_p, on tempered scores.

    Source: nucleus sampling (top_p), Holtzman et al. 2019, arXiv 1904.09751.
    """
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it have not reached top_p; the first always stays.
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def init_cache(spec: ModelSpec, batch: int, room: int) -> Cache:
    """An empty cache for `batch` sequences of up to `room` positions."""
    dtype = jnp.dtype(spec.dtype)

    def zeros(length):
        return jnp.zeros((length, batch, spec.n_heads, room, spec.head_width), dtype)

    return Cache(tuple(KeyValue(zeros(length), zeros(length)) for _, length in spec.runs), jnp.int32(0))


def for_decoding(spec: ModelSpec, variables: dict) -> tuple[ModelSpec, dict]:
    """Spec and variables in the form that decodes fastest; the scores stay the same.

    Layers are unrolled, and matrices are stored in the dtype they are used in:
    neither a slice of a stack nor a cast is then made at every token.
    """
    spec, variables = unrolled(spec, variables)

    def cast(path, leaf):
        is_matrix = path[-1].key.startswith("w_")
        return leaf.astype(spec.dtype) if is_matrix else leaf

    return spec, {**variables, "params": jax.tree_util.tree_map_with_path(cast, variables["params"])}


def prefill(variables, cache: Cache, prompt_BC, length, key, *, spec: ModelSpec, sampling: Sampling):
    """Reads a prompt and chooses the first new token.

    Args:
      variables: as `for_decoding` gives them.
      cache: empty.
      prompt_BC: int32, padded to the right; what stands there is not attended to.
      length: int32 scalar, positions that are not padding.
      key: typed PRNG key of the whole generation.
      spec, sampling: static under jit.

    Returns:
      token int32 [B], and the cache with `length` positions.
    """
    logits_B1V, _, cache = Transformer(spec).apply(variables, prompt_BC, cache, only=length - 1)
    # Padding filled the cache beyond `length`; each later position is written before it is read.
    cache = cache._replace(length=length)
    return sample(logits_B1V[:, 0], jax.random.fold_in(key, length), sampling), cache


def advance(variables, cache: Cache, token_B, key, *, spec: ModelSpec, sampling: Sampling):
    """One step of decoding: (next token int32 [B], extended cache)."""
    logits_B1V, _, cache = Transformer(spec).apply(variables, token_B[:, None], cache)
    return sample(logits_B1V[:, 0], jax.random.fold_in(key, cache.length), sampling), cache


_prefill = jax.jit(prefill, static_argnames=("spec", "sampling"), donate_argnames=("cache",))
_advance = jax.jit(advance, static_argnames=("spec", "sampling"), donate_argnames=("cache",))


def stream(
    spec: ModelSpec,
    variables: dict,
    prompt_BC,
    n_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yields `n_tokens` times the next token of every sequence, int32 [B].

    Args:
      spec, variables: as `for_decoding` gives them (any other form works, slower).
      prompt_BC: whole numbers [B, C], at least one a row, below the vocabulary.
      n_tokens: tokens to make; prompt and new tokens fit the context.
      sampling: how tokens are chosen.
      seed: the same seed gives the same tokens.

    Raises:
      InputError: names the argument, its value and what is allowed.
    """
    prompt_BC = _checked(spec, prompt_BC, n_tokens)
    check_positive_int("seed", seed, least=0)
    batch, length = prompt_BC.shape
    # Rounded sizes: prompts of similar length share one compiled program.
    padded = min(_power_of_two(length), spec.context)
    room = min(_power_of_two(length + n_tokens), spec.context)
    prompt_BC = jnp.asarray(np.pad(prompt_BC, ((0, 0), (0, padded - length))))
    run = functools.partial(_advance, spec=spec, sampling=sampling)
    key, cache = jax.random.key(seed), init_cache(spec, batch, room)
    token_B, cache = _prefill(
        variables, cache, prompt_BC, jnp.int32(length), key, spec=spec, sampling=sampling
    )
    for i in range(n_tokens):
        ahead_B = token_B
        if i + 1 < n_tokens:  # the next step is under way before this one is looked at
            ahead_B, cache = run(variables, cache, token_B, key)
        yield np.asarray(token_B)
        token_B = ahead_B


def generate(
    spec: ModelSpec,
    variables: dict,
    prompt_BC,
    n_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_id: int | None = None,
) -> np.ndarray:
    """The new tokens of every sequence: int32 [B, at most n_tokens].

    Arguments as for `stream`; generation ends early when every sequence has
    made `stop_id`.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> spec = ModelSpec(vocab_size=9, context=8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> variables = Transformer(spec).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      >>> generate(spec, variables, [[1, 2, 3]], n_tokens=5).shape
      (1, 5)
    """
    tokens, stopped_B = [], np.zeros(len(prompt_BC), bool)
    spec, variables = for_decoding(spec, variables)
    for token_B in stream(spec, variables, prompt_BC, n_tokens, sampling, seed):
        tokens.append(token_B)
        if stop_id is not None:
            stopped_B |= token_B == stop_id
        if stopped_B.all():
            break
    return np.stack(tokens, axis=1)


def _checked(spec, prompt_BC, n_tokens):
    """The prompt as int32 [B, C]; raises InputError where it cannot be continued."""
    check_positive_int("tokens", n_tokens)
    prompt_BC = np.asarray(prompt_BC)
    if prompt_BC.ndim != 2 or prompt_BC.size == 0:
        raise InputError(
            f"prompt: shape {prompt_BC.shape} is not allowed; give at least one token a sequence."
        )
    if prompt_BC.min() < 0 or prompt_BC.max() >= spec.vocab_size:
        worst = prompt_BC.max() if prompt_BC.max() >= spec.vocab_size else prompt_BC.min()
        raise InputError(f"prompt: token {worst} is not allowed; use 0 to {spec.vocab_size - 1}.")
    length = prompt_BC.shape[1]
    if length + n_tokens > spec.context:
        raise InputError(
            f"tokens: {n_tokens} new tokens after a prompt of {length} do not fit the model's context of "
            f"{spec.context}; use at most {max(0, spec.context - length)}, or a shorter prompt."
        )
    return prompt_BC.astype(np.int32)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n, and at least 16."""
    return max(16, 1 << (n - 1).bit_length())
