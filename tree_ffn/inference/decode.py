"""One step of making text: key-value cache, reading prompts, one more token of every row.

`batching.Batch` continues sequences by these steps.
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.inference.penalties import Changes, changed, counted
from tree_ffn.inference.sampling import Rules, sample
from tree_ffn.inference.scoring import token_scores
from tree_ffn.models.attention import KeyValue
from tree_ffn.models.spec import ModelSpec
from tree_ffn.models.transformer import Cache, Transformer, unrolled


def init_cache(spec: ModelSpec, batch: int, room: int) -> Cache:
    """An empty cache for `batch` sequences of up to `room` positions.

    Args:
      spec: the model.
      batch: B, how many sequences.
      room: M, positions of each.
    """
    dtype = jnp.dtype(spec.dtype)

    def zeros(length):
        return jnp.zeros((length, batch, spec.n_heads, room, spec.head_width), dtype)

    return Cache(tuple(KeyValue(zeros(length), zeros(length)) for _, length in spec.runs), jnp.int32(0))


def for_decoding(spec: ModelSpec, variables: dict) -> tuple[ModelSpec, dict]:
    """Spec and variables in the form that decodes fastest; the scores stay the same.

    Layers are unrolled, and their matrices are stored in the dtype they are used in:
    neither a slice of a stack nor a cast of them is then made at every token. The
    embedding and the output head stay as they are, and the head is cast for the scores.
    """
    spec, variables = unrolled(spec, variables)

    def cast(path, leaf):
        is_matrix = path[-1].key.startswith("w_")
        return leaf.astype(spec.dtype) if is_matrix else leaf

    return spec, {**variables, "params": jax.tree_util.tree_map_with_path(cast, variables["params"])}


def prefill(
    variables,
    prompt_BC,
    length_B,
    key_B,
    by: Rules,
    changes: Changes | None = None,
    *,
    spec: ModelSpec,
    n_top: int | None = None,
):
    """Reads prompts of their own lengths, chooses the first new token of each, and scores the prompts.

    Args:
      variables: as `for_decoding` gives them.
      prompt_BC: int32, padded to the right; what stands there is not attended to.
      length_B: int32 [B], positions that are not padding.
      key_B: typed PRNG keys of the whole generation.
      by: how tokens are chosen.
      changes: of the scores, before.
      spec: the model; static under jit.
      n_top: how many likeliest tokens are told at every position of the prompt; static under jit. None scores
        no prompt: then the scores of all V tokens are computed at the last position only.

    Returns:
      token int32 [B] (`sampling.NO_TOKEN` where there is none), the model's scores float32 [B, V], the cache
      with `length_B` positions, and `TokenScores` [B, C - 1] of the prompt's tokens from the second on, or
      None.
    """
    cache, last_B1 = init_cache(spec, *prompt_BC.shape), (length_B - 1)[:, None]
    only = last_B1 if n_top is None else None
    logits_BCV, _, cache = Transformer(spec).apply(variables, prompt_BC, cache, only=only)
    if n_top is None:
        logits_BV, prompt = logits_BCV[:, 0], None
    else:
        logits_BV = jnp.take_along_axis(logits_BCV, last_B1[..., None], axis=1, mode="clip")[:, 0]
        prompt = token_scores(logits_BCV[:, :-1], prompt_BC[:, 1:], n_top)
    # Padding filled the cache beyond a row's length; each later position is written before it is read.
    token_B = sample(changed(logits_BV, changes), key_B, length_B, by)
    return token_B, logits_BV, cache._replace(length=length_B), prompt


def advance(
    variables, cache: Cache, token_B, key_B, by: Rules, changes: Changes | None = None, *, spec: ModelSpec
):
    """One step of decoding, after `token_B` was made.

    Args:
      variables: {"params", "routing"} of the model.
      cache: of the tokens so far.
      token_B: int32, the token that each row made last.
      key_B: random keys of the rows.
      by: how each row chooses.
      changes: of the scores, by row; None: none.
      spec: the model.

    Returns:
      the next token int32 [B], the model's scores float32 [B, V], the extended cache, and the changes
      with `token_B` counted.
    """
    changes = None if changes is None else counted(changes, token_B)
    logits_B1V, _, cache = Transformer(spec).apply(variables, token_B[:, None], cache)
    logits_BV = logits_B1V[:, 0]
    return sample(changed(logits_BV, changes), key_B, cache.length, by), logits_BV, cache, changes


def check_tokens(spec: ModelSpec, prompt, n_tokens: int) -> None:
    """Raises InputError where `n_tokens` (0 too) cannot follow the ids of a prompt.

    Args:
      spec: the model.
      prompt: token ids.
      n_tokens: how many are to be made.
    """
    if not len(prompt):
        raise InputError("prompt: it has no tokens; give at least one.")
    if min(prompt) < 0 or max(prompt) >= spec.vocab_size:
        worst = max(prompt) if max(prompt) >= spec.vocab_size else min(prompt)
        raise InputError(f"prompt: token {worst} is not allowed; use 0 to {spec.vocab_size - 1}.")
    if len(prompt) + n_tokens > spec.max_seq_len:
        room = spec.max_seq_len - len(prompt)
        raise InputError(
            f"tokens: {n_tokens} new tokens after a prompt of {len(prompt)} do not fit the model's context "
            f"of {spec.max_seq_len}; use {f'at most {room}, or ' if room > 0 else ''}a shorter prompt."
        )


def power_of_two(n: int, least: int = 16) -> int:
    """The least power of two that is at least n, and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())
