"""Other texts that a trained model is scored on, whole: the flag --texts of several programs."""

import os
import re
from collections.abc import Iterable

from experiments.common import run_config
from experiments.reporting import record
from tree_ffn.data import corpus_spec_from_config
from tree_ffn.data.text_files import matches, trained_on
from tree_ffn.data.whole_text import whole_text
from tree_ffn.errors import InputError, NotFinite
from tree_ffn.training.evaluate import evaluate_whole, tokenizer_of
from tree_ffn.training.restore import Restored, restore_for_inference
from tree_ffn.training.sharding import make_mesh

HELP = "Other texts to score whole: name=glob pattern, ... (every token once; nats and perplexity a word)."
FIGURES = ("loss", "bits_per_byte", "nats_per_word", "word_ppl")


def parse(words: Iterable[str]) -> dict[str, str]:
    """{name: glob pattern} of the words of --texts; looks whether there are such files.

    Raises:
      InputError: a word is not name=pattern, a name is there twice, or nothing matches.

    Example:
      >>> parse(["license=LICENSE"])
      {'license': 'LICENSE'}
    """
    texts = {}
    for word in _joined(words):
        name, equals, files = word.partition("=")
        if not (re.fullmatch(r"[a-z]\w*", name) and equals and files) or name in texts:
            raise InputError(f"--texts: {word!r} is not allowed; use name=glob pattern, each name once.")
        matches("--texts", files)
        texts[name] = files
    return texts


def _joined(words: Iterable[str]) -> list[str]:
    """The words, those put together again that a comma in the path of a file has parted."""
    found: list[str] = []
    for word in words:
        known = [f"{found[-1]}{comma}{word}" for comma in (",", ", ")] if found else []
        known = [whole for whole in known if os.path.isfile(os.path.expanduser(whole.partition("=")[2]))]
        if known:
            found.pop()
        found.append(known[0] if known else word)
    return found


def score_at_end(workdir: str, config, texts: dict[str, str], **names) -> None:
    """Scores a run that has just ended, by its latest checkpoint; `names` as `score` takes them.

    Args:
      workdir: of the run.
      config: of the run.
      texts: {name: files}.
      **names: as `score` takes them.
    """
    run = restore_for_inference(workdir, "latest", make_mesh(config.mesh.data, config.mesh.model))
    score(run, texts, batch_size=config.train.batch_size // config.train.grad_accum_steps, **names)


def score(
    run: Restored, texts: dict[str, str], *, batch_size: int = 16, tokenizer: str | None = None,
    text_field: str = "text", results: str | None = None, table: str = "", row: str = "",
    command: str | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Scores a model on texts, prints a line for each, and appends them to a results file.

    Args:
      run: a restored run.
      texts: as `parse` returns them.
      batch_size: rows a batch.
      tokenizer: where the run's tokenizer is now, if it has moved.
      text_field: of JSON and parquet.
      results: file to append to; None appends nothing.
      table, row: names of the rows.
      command: of the rows; by default this process's own.

    Returns:
      {name: figures} as `evaluate_whole` returns them.
    """
    encoder, found, config = tokenizer_of(run, tokenizer), {}, run_config.config_of(run)
    for name, files in texts.items():
        say_if_trained_on(run, files, name)
        text = whole_text(files, encoder, text_field)
        try:
            found[name] = figures = evaluate_whole(run, text, batch_size)
        except NotFinite as error:
            raise NotFinite(f"{name}: {error}") from None
        shown = {key: figures[key] for key in FIGURES}
        said = ", ".join(f"{key.replace('_', ' ')} {value:,.4f}" for key, value in shown.items())
        print(f"{name}: {said}; {figures['tokens']:,} tokens, {figures['words']:,} words", flush=True)
        if text.lost.n:
            print(f"{name}: {text.lost.said()}", flush=True)
        if results:
            record.append_text_figures(
                results, name, shown, table=table, row=row, config=config, data_meta=run.meta["data"],
                sha256=text.sha256, command=command,
            )  # fmt: skip
    return found


def say_if_trained_on(run: Restored, files: str, name: str) -> None:
    """Prints a line where a text to score is one that the run was trained on: its loss says little then.

    Args:
      run: the model.
      files: of the text to score.
      name: of the text.
    """
    if known := trained_on(corpus_spec_from_config(run.config), files):
        said = f"{known[0]} and {len(known) - 1} more files" if len(known) > 1 else f"{known[0]}"
        print(f"{name}: the run was trained on {said}", flush=True)
