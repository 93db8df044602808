"""A trained model's metrics on the text it was validated on, or on any other."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.data import CorpusSpec, PreparedCorpus, Tokenizer, load_tokenizer, prepare, valid_batches
from tree_ffn.data.spec import FIELDS_OF, corpus_of
from tree_ffn.data.whole_text import WholeText
from tree_ffn.errors import InputError, check_metric, check_positive_int
from tree_ffn.training.compiled import Scorer
from tree_ffn.training.losses import next_token_loss
from tree_ffn.training.metrics import costs, loss_metrics, usage_metrics
from tree_ffn.training.restore import Restored
from tree_ffn.training.sharding import put_batch


def other_corpus(run: Restored, **changes):
    """The run's corpus, prepared, with the named fields of its CorpusSpec changed.

    Where none is, and the text is no longer what the run was trained on, it prints so.

    Args:
      run: a restored run; its tokenizer must give the same ids as in training.
      **changes: fields of `CorpusSpec`; None keeps the run's.

    Raises:
      InputError: the text cannot be used, or the tokenizer is another.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    spec = CorpusSpec(**changed_fields(run.config.data, changes))
    # Before the text: to tokenise it by another tokenizer may take long.
    tokenizer_of(run, spec.tokenizer)
    corpus = prepare(spec, row_tokens=run.model.max_seq_len + 1)
    known = run.meta["data"].get("sha256")
    if not changes.keys() - {"tokenizer", "cache_dir"} and known not in (None, corpus.meta["sha256"]):
        print(
            "data: the text of the run has changed since it was trained; this is the text of today",
            flush=True,
        )
    return corpus


def tokenizer_of(run: Restored, where: str | None = None) -> Tokenizer:
    """The run's tokenizer.

    Args:
      run: a restored run.
      where: as `data.tokenizer`, where its files have moved.

    Raises:
      InputError: what is there is another tokenizer.
    """
    where = where or run.config.data.tokenizer
    tokenizer = load_tokenizer(where)
    known, found = run.meta["data"]["tokenizer_sha256"], tokenizer.fingerprint
    if known != found:
        raise InputError(
            f"data.tokenizer: {where!r} is not the tokenizer of the run "
            f"(sha256 {found[:12]} now, {known[:12]} then); put the old file back, or name it."
        )
    return tokenizer


# Fields that no longer apply once another is named: a new set of files is not divided as the run's was.
_REPLACED = {"files": "valid_files", "tfds_dir": "tfds_name", "tfds_name": "tfds_dir"}


def changed_fields(data, changes: dict) -> dict:
    """Fields of a CorpusSpec: the run's, without those that the changes leave without use."""
    fields = {field.name: data[field.name] for field in dataclasses.fields(CorpusSpec)}
    asked = corpus_of("auto", *(changes.get(name, "") for name in ("files", "tfds_dir", "tfds_name")))
    corpus = changes.get("corpus") or (fields["corpus"] if asked == "python_stdlib" else asked)
    dropped = [_REPLACED[name] for name in changes if name in _REPLACED]
    if corpus != "auto":
        dropped += [name for owner, names in FIELDS_OF.items() if owner != corpus for name in names]
    return {**fields, **dict.fromkeys(dropped, ""), "corpus": corpus, **changes}


def evaluate(
    run: Restored, corpus: PreparedCorpus, split: str = "valid", batch_size: int = 16, n_batches: int = 0
) -> dict[str, float]:
    """Figures of a model on a prepared corpus.

    Args:
      run: a restored run.
      corpus: rows of the model's context + 1 tokens.
      split: `train`, `valid` or `all`.
      batch_size: rows a batch; metrics depend on it by rounding alone where `n_batches` is 0.
      n_batches: batches of each split; 0 is all.

    Returns:
      loss, ppl, bits_per_byte, `metrics.costs`, usage of every layer, tokens, step.

    Raises:
      InputError: batches do not split over the devices of `run.mesh`.
      NotFinite: the loss is NaN or infinite.
    """
    _check_batch_size(run, batch_size)
    splits = ("train", "valid") if split == "all" else (split,)
    sources = [getattr(corpus, name) for name in splits]
    batches = [valid_batches(source, batch_size, n_batches) for source in sources if len(source)]
    with jax.set_mesh(run.mesh):
        score = Scorer(run.model, run.mesh)(run.variables, itertools.chain(*batches))
    check_metric(f"loss on {corpus.meta['corpus']} ({split})", score.loss)
    facts = [corpus.meta["splits"][name] for name in splits]
    bytes_per_token = sum(fact["bytes"] for fact in facts) / sum(fact["tokens"] for fact in facts)
    return {
        **loss_metrics(score.loss, bytes_per_token),
        **costs(run.model),
        **usage_metrics(score.usage, run.model),
        "tokens": score.tokens,
        "step": run.meta["step"],
    }


def _check_batch_size(run: Restored, batch_size: int) -> None:
    check_positive_int("batch_size", batch_size)
    if batch_size % run.mesh.shape["data"]:
        raise InputError(
            f"batch_size: {batch_size} is not allowed; "
            f"use a multiple of the {run.mesh.shape['data']} devices."
        )


def evaluate_whole(run: Restored, text: WholeText, batch_size: int = 16) -> dict[str, float]:
    """Figures of a model on a text of which every token is predicted once.

        loss = nats / tokens,   nats_per_word = nats / words,   word_ppl = exp(nats_per_word)

    Windows of the model's context follow each other without overlap, as is usual
    where models are compared by WikiText: the first tokens of a window have little
    to go by.

    Args:
      run: a restored run.
      text: of `whole_text`, by the run's tokenizer.
      batch_size: rows a batch.

    Returns:
      loss, ppl, bits_per_byte, nats_per_word, word_ppl, tokens, words.

    Raises:
      InputError: batches do not split over the devices of `run.mesh`.
      NotFinite: names the first rows whose loss is NaN or infinite.
    """
    _check_batch_size(run, batch_size)
    tokens, counted = text.rows(run.model.max_seq_len)
    missing = -len(tokens) % batch_size  # one shape, one program
    tokens, counted = (np.pad(array, ((0, missing), (0, 0))) for array in (tokens, counted))
    nats = 0.0
    with jax.set_mesh(run.mesh):
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            batch = (put_batch(array[rows], run.mesh) for array in (tokens, counted.astype(np.int32)))
            nats += float(_nats(run.variables, *batch, model=run.model))
            check_metric(f"loss in windows {start} to {start + batch_size - 1} of the text", nats)
    n_tokens = int(text.counted.sum())
    return {
        **loss_metrics(nats / n_tokens, text.bytes / n_tokens),
        "nats_per_word": nats / text.words,
        "word_ppl": math.exp(min(nats / text.words, 700.0)),
        "tokens": n_tokens,
        "words": text.words,
    }


@functools.partial(jax.jit, static_argnames=("model",))
def _nats(variables: dict, tokens: jax.Array, counted_BC: jax.Array, model) -> jax.Array:
    """Sum of the counted targets' cross-entropies."""
    _, nll_BC, _ = next_token_loss(model, variables, tokens)
    return jnp.sum(jnp.where(counted_BC > 0, nll_BC, 0.0))
