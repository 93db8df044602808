"""A trained model's figures on the text it was validated on, or on any other."""

import dataclasses
import itertools

import jax

from tree_ffn.data import CorpusSpec, PreparedCorpus, load_tokenizer, prepare, valid_batches
from tree_ffn.data.spec import FIELDS_OF, default_corpus
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.training.checkpoint import Restored
from tree_ffn.training.metrics import active_share, loss_figures, usage_figures
from tree_ffn.training.programs import Scorer


def other_corpus(run: Restored, **changes):
    """The run's corpus, prepared, with the named fields of its CorpusSpec changed.

    Args:
      run: a restored run; its tokenizer must give the same ids as in training.
      **changes: fields of `CorpusSpec`; None keeps the run's.

    Raises:
      InputError: the text cannot be used, or the tokenizer is another.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    spec = CorpusSpec(**changed_fields(run.config.data, changes))
    # Before the text: to tokenise it by another tokenizer may take long.
    known, found = run.meta["data"]["tokenizer_sha256"], load_tokenizer(spec.tokenizer).fingerprint
    if known != found:
        raise InputError(
            f"data.tokenizer: {spec.tokenizer!r} is not the tokenizer of the run "
            f"(sha256 {found[:12]} now, {known[:12]} then); put the old file back, or name it."
        )
    return prepare(spec, row_tokens=run.model.context + 1)


# Fields that no longer apply once another is named: a new set of files is not divided as the run's was.
_REPLACED = {"files": "valid_files", "tfds_dir": "tfds_name", "tfds_name": "tfds_dir"}


def changed_fields(data, changes: dict) -> dict:
    """Fields of a CorpusSpec: the run's, without those that the changes leave without use."""
    fields = {field.name: data[field.name] for field in dataclasses.fields(CorpusSpec)}
    asked = default_corpus(*(changes.get(name, "") for name in ("files", "tfds_dir", "tfds_name")))
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
      batch_size: rows a batch; a last part of less than a batch is left out.
      n_batches: batches of each split; 0 is all.

    Returns:
      loss, ppl, bits_per_byte, active_share, usage of every layer, tokens, step.

    Raises:
      InputError: batches do not split over the devices of `run.mesh`.
    """
    check_positive_int("batch_size", batch_size)
    if batch_size % run.mesh.shape["data"]:
        raise InputError(
            f"batch_size: {batch_size} is not allowed; "
            f"use a multiple of the {run.mesh.shape['data']} devices."
        )
    splits = ("train", "valid") if split == "all" else (split,)
    sources = [getattr(corpus, name) for name in splits]
    batches = [valid_batches(source, batch_size, n_batches) for source in sources if len(source)]
    with jax.set_mesh(run.mesh):
        score = Scorer(run.model, run.mesh)(run.variables, itertools.chain(*batches))
    facts = [corpus.meta["splits"][name] for name in splits]
    bytes_per_token = sum(fact["bytes"] for fact in facts) / sum(fact["tokens"] for fact in facts)
    return {
        **loss_figures(score.loss, bytes_per_token),
        "active_share": active_share(run.model),
        **usage_figures(score.usage, run.model),
        "tokens": score.tokens,
        "step": run.meta["step"],
    }
