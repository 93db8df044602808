"""A model to begin with: a run of training, or an exported model, whose text has to be named."""

import os

import jax

from experiments.common import loaded, tokenizer_files
from tree_ffn.config import make_config
from tree_ffn.data import PreparedCorpus, corpus_spec_from_config, prepare
from tree_ffn.models import export, spec_to_dict
from tree_ffn.paths import local
from tree_ffn.plain import namespace, plain
from tree_ffn.training.evaluate import other_corpus
from tree_ffn.training.restore import Restored, restore_for_inference
from tree_ffn.training.sharding import make_mesh, shardings_for


def load(
    place: str, step: int | str = "best", tokenizer: str | None = None, field: str = "workdir"
) -> Restored:
    """The model of a directory: of a training run, or of an export.

    The config of an export is that of configs/common.py, with the model's tokenizer.

    Args:
      place: the directory.
      step: of a run: `best`, `latest`, or a number.
      tokenizer: of an export: where its tokenizer is, if not beside it.
      field: what names the directory, for errors.

    Raises:
      InputError: there is no model, or no tokenizer that fits it.
    """
    place = local(place, field)
    if not os.path.exists(os.path.join(place, export.WEIGHTS)):
        return restore_for_inference(place, step)
    found = loaded.load(None, place, tokenizer)
    settings = plain(make_config())
    settings["data"]["tokenizer"] = tokenizer or tokenizer_files.beside(
        place, export.read_config(place)["tokenizer"]
    )
    mesh = make_mesh(1, 1, jax.devices()[:1])
    variables = jax.device_put(found.variables, shardings_for(found.variables, mesh))
    data = {"tokenizer_sha256": found.tokenizer.fingerprint, "vocab_size": found.tokenizer.vocab_size}
    meta = {"config": settings, "data": data, "step": 0, "model": spec_to_dict(found.spec)}
    return Restored(namespace(settings), found.spec, variables, meta, mesh)


def with_text(start: Restored, **data) -> tuple[Restored, PreparedCorpus]:
    """The start and its text; an export has the text that is named from here on.

    Args:
      start: of `load`.
      **data: fields of `CorpusSpec`; None keeps what the start says.

    Raises:
      InputError: the text cannot be used.
    """
    if "sha256" in start.meta["data"]:
        return start, other_corpus(start, **data)
    config = {**start.meta["config"]}
    named = {name: value for name, value in data.items() if value is not None}
    config["data"] = {**config["data"], "corpus": "auto", **named}
    spec = corpus_spec_from_config(namespace(config))
    config["data"]["corpus"] = spec.corpus
    corpus = prepare(spec, row_tokens=start.model.max_seq_len + 1)
    meta = {**start.meta, "config": config, "data": corpus.meta}
    return start._replace(config=namespace(config), meta=meta), corpus
