"""Scores a checkpoint on the text it was validated on, or on any other.

    python -m experiments.evaluate --workdir=runs/tree
    python -m experiments.evaluate --workdir=runs/tree --step=latest --files='novels/*.txt.xz'
    python -m experiments.evaluate --workdir=runs/tree --results=results/cpu_small.jsonl --row=dense

Prints loss (nats a token), perplexity, bits per byte, active share, and the use
of every layer's leaves or experts; --json writes the same.
"""

import dataclasses
import itertools
import json

import jax
from absl import flags

from experiments import cli, record
from tree_ffn.data import corpus_spec_from_config, prepare, valid_batches
from tree_ffn.data.spec import CORPORA
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.models.ffn import units
from tree_ffn.training.checkpoint import Restored, restore_for_inference
from tree_ffn.training.metrics import loss_figures, usage_figures
from tree_ffn.training.programs import Scorer
from tree_ffn.training.sharding import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_CORPUS = flags.DEFINE_enum("corpus", None, CORPORA, "Another corpus than the run's.")
_FILES = flags.DEFINE_string("files", None, "Text files to score (glob patterns, comma separated).")
_TFDS_DIR = flags.DEFINE_string("tfds_dir", None, "Prepared TFDS directory to score.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Where prepared rows are kept; as in the run by default.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "valid", "all"],
    "Which rows; with --files all, else valid.",
)
_BATCHES = flags.DEFINE_integer("batches", 0, "Batches to score; 0 is all.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows a batch.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_RESULTS = flags.DEFINE_string("results", None, "Append the figures to this results file (JSONL).")
_TABLE = flags.DEFINE_enum("table", "cpu_small", record.TABLES, "Table of the results rows.")
_ROW = flags.DEFINE_string("row", None, "Name of the results row.")


def main() -> None:
    if _WORKDIR.value is None:
        raise InputError("--workdir is missing; name the directory of a training run.")
    if _RESULTS.value and not _ROW.value:
        raise InputError("--row is missing; --results needs a name for the row.")
    check_positive_int("--batch_size", _BATCH_SIZE.value)
    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    mesh = make_mesh(data=-1, model=1)
    if _BATCH_SIZE.value % mesh.shape["data"]:
        raise InputError(
            f"--batch_size: {_BATCH_SIZE.value} is not allowed; use a multiple of the "
            f"{mesh.shape['data']} devices."
        )
    run = restore_for_inference(_WORKDIR.value, step, mesh)
    corpus = other_corpus(
        run, corpus=_CORPUS.value, files=_FILES.value, tfds_dir=_TFDS_DIR.value, cache_dir=_CACHE_DIR.value
    )
    split = _SPLIT.value or ("all" if _FILES.value else "valid")
    figures = evaluate(run, corpus, mesh, split, _BATCH_SIZE.value, _BATCHES.value)
    print(table(figures, f"{corpus.meta['corpus']} ({split}), step {figures['step']} of {_WORKDIR.value}"))
    if _JSON.value:
        write_json(_JSON.value, figures)
    if _RESULTS.value:
        record.append_figures(
            _RESULTS.value,
            figures,
            table=_TABLE.value,
            row=_ROW.value,
            config=run.config,
            data_meta=corpus.meta,
        )


def other_corpus(run: Restored, **changes):
    """The run's corpus, prepared, with the named fields of its CorpusSpec changed.

    Args:
      run: a restored run; its tokenizer must give the same ids as in training.
      **changes: fields of `CorpusSpec`; None keeps the run's.

    Raises:
      InputError: the text cannot be used, or the tokenizer is another.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if "files" in changes:
        changes = {"corpus": "files", "valid_files": "", **changes}
    if "tfds_dir" in changes:
        changes = {"corpus": "tfds", "tfds_name": "", **changes}
    spec = dataclasses.replace(corpus_spec_from_config(run.config), **changes)
    corpus = prepare(spec, row_tokens=run.model.context + 1)
    known, found = run.meta["data"]["tokenizer_sha256"], corpus.meta["tokenizer_sha256"]
    if known != found:
        raise InputError(
            f"data.tokenizer: {spec.tokenizer!r} is no longer the tokenizer of the run "
            f"(sha256 {found[:12]} now, {known[:12]} then); put the old file back."
        )
    return corpus


def evaluate(run: Restored, corpus, mesh, split="valid", batch_size: int = 16, n_batches: int = 0) -> dict:
    """Figures of a model on a prepared corpus.

    Args:
      run: a restored run.
      corpus: a `PreparedCorpus` with rows of the model's context + 1 tokens.
      mesh: where to run; its "data" axis divides `batch_size`.
      split: `train`, `valid` or `all`.
      batch_size: rows a batch; a last part of less than a batch is left out.
      n_batches: batches of each split; 0 is all.

    Returns:
      loss, ppl, bits_per_byte, active_share, usage of every layer, tokens, step.
    """
    splits = ("train", "valid") if split == "all" else (split,)
    sources = [getattr(corpus, name) for name in splits]
    batches = [valid_batches(source, batch_size, n_batches) for source in sources if len(source)]
    with jax.set_mesh(mesh):
        score = Scorer(run.model, mesh)(run.variables, itertools.chain(*batches))
    facts = [corpus.meta["splits"][name] for name in splits]
    bytes_per_token = sum(fact["bytes"] for fact in facts) / sum(fact["tokens"] for fact in facts)
    layers = [units(ffn) for ffn in run.model.ffns]
    return {
        **loss_figures(score.loss, bytes_per_token),
        "active_share": sum(layer.active for layer in layers) / sum(layer.total for layer in layers),
        **usage_figures(score.usage, run.model),
        "tokens": score.tokens,
        "step": run.meta["step"],
    }


def table(figures: dict, title: str) -> str:
    """The figures as text: one line each, and one line a layer."""
    names = {"loss": "nats a token", "ppl": "", "bits_per_byte": "bits", "active_share": "of all units"}
    lines = [title] + [f"  {name:<14}{figures[name]:>10.4f} {unit}" for name, unit in names.items()]
    lines.append(f"  {'tokens':<14}{figures['tokens']:>10,}")
    by_layer: dict[int, dict] = {}
    for name, value in figures.items():
        metric, _, layer = name.partition("/")
        if layer:
            by_layer.setdefault(int(layer), {})[metric] = value
    for layer, values in by_layer.items():
        said = ", ".join(f"{metric.replace('_', ' ')} {value:.3f}" for metric, value in values.items())
        lines.append(f"  layer {layer:<8}{said}")
    return "\n".join(lines)


def write_json(path: str, figures: dict) -> None:
    """Writes figures as one JSON object.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--json: {path} cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    cli.run(main)
