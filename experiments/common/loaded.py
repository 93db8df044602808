"""A trained model of either kind, ready to read and write text: a run's checkpoint, or an exported model."""

import dataclasses
import os
from typing import Any, NamedTuple

from experiments.common import run_config, tokenizer_files
from experiments.reporting import record
from tree_ffn.data.tokenizers import Tokenizer, load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.inference import decode
from tree_ffn.models import export
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.spec import ModelSpec


class Loaded(NamedTuple):
    """What reading and writing text needs.

    Attributes:
      spec: the model; executions are chosen by the number of tokens.
      variables: {"params", "routing"}.
      tokenizer: the one it was trained with.
      begins_with: ids that stand before a prompt's text. An imported model has those that its
        tokenizer puts there under transformers: OPT's `</s>`, and none for GPT-2; a trained one has none.
      facts: what a results row says of it: its public config.
      name: the last part of its directory's name.
      files: the directory of the tokenizer's files, where a chat template may be; None if there is none.
    """

    spec: ModelSpec
    variables: dict
    tokenizer: Tokenizer
    begins_with: list[int]
    facts: dict[str, Any]
    name: str
    files: str | None = None

    def prompt(self, text: str) -> tuple[int, ...]:
        """The ids of a prompt to continue; one without text begins a document.

        It follows `begins_with`. Ids that a client of experiments/serve.py sends are taken as they are.

        Raises:
          InputError: the text has no tokens, or is none.
        """
        try:
            text.encode()  # tokenizers say each in their own way that they cannot
        except UnicodeEncodeError:
            raise InputError(
                "prompt: it has bytes that are not UTF-8, or half of a surrogate pair."
            ) from None
        ids = self.tokenizer.encode(text).tolist()
        if text and not ids:
            raise InputError(f"prompt: {text[:40]!r} has no tokens; use text that the tokenizer knows.")
        if self.tokenizer.losses and (dropped := self.tokenizer.losses.dropped(text)):
            raise InputError(
                f"prompt: {len(dropped)} of its {len(text)} characters have no token, the first of them "
                f"{dropped[0]!r}; leave them out."
            )
        return (*self.begins_with, *ids) or (self.tokenizer.end_id,)

    def for_decoding(self) -> "Loaded":
        """The same model in the form that decodes fastest."""
        spec, variables = decode.for_decoding(self.spec, self.variables)
        return self._replace(spec=spec, variables=variables)


def reader(tokenizer: str, context: int, begins_with: list[int], facts: dict | None = None) -> Loaded:
    """What reads text as a model would, and has no weights.

    Args:
      tokenizer: where its files are.
      context: the model's.
      begins_with: as of `Loaded`.
      facts: of the model, where they are known.
    """
    encoder = load_tokenizer(tokenizer)
    sizes = {"width": 1, "n_layers": 1, "n_heads": 1, "ffns": (DenseSpec(1),)}
    spec = ModelSpec(vocab_size=encoder.vocab_size, max_seq_len=context, **sizes)
    return Loaded(spec, {}, encoder, begins_with, facts or {}, "")


def load(workdir: str | None, directory: str | None, tokenizer: str | None = None, step="best") -> Loaded:
    """The model of a training run or of an export.

    Args:
      workdir: of a run; or None.
      directory: of an exported model; or None.
      tokenizer: where its files are now, if they have moved.
      step: checkpoint of a run: best, latest, or a number.

    Raises:
      InputError: not one of the two is named, or the tokenizer does not fit.
    """
    if (workdir is None) == (directory is None):
        raise InputError("--workdir or --export: give one of them, and not both, to say which model to use.")
    if directory is not None:
        spec, variables, config = export.load(directory)
        meta = config["meta"]
        name = tokenizer_files.beside(directory, config["tokenizer"])
        begins_with = meta.get("begins_with", [])
        facts = {"model": config["model"], "seed": meta.get("config", {}).get("seed")}
    else:
        # Checkpoints need orbax; an exported model does not.
        from tree_ffn.training.restore import restore_for_inference

        run = restore_for_inference(workdir, step)
        spec, variables, name, begins_with = run.model, run.variables, run.config.data.tokenizer, []
        facts = record.public_config(run_config.config_of(run), run.meta["data"])
    if not (tokenizer or name):
        raise InputError("--tokenizer is missing; the model was imported without one.")
    encoder = load_tokenizer(tokenizer or name, directory)
    if encoder.vocab_size != spec.vocab_size:
        raise InputError(
            f"--tokenizer: {encoder.name} has {encoder.vocab_size} tokens, the model {spec.vocab_size}; "
            "name the tokenizer that the model was trained with."
        )
    # The execution that training was told to use is not the one for a token at a time.
    spec = dataclasses.replace(spec, implementation=None)
    called = os.path.basename(os.path.abspath(directory or workdir or ""))
    named = tokenizer or name
    files = directory if named == "bytes" else tokenizer_files.directory_of(named)
    return Loaded(spec, variables, encoder, begins_with, facts, called, files)
