"""The tokenizer's files beside a model: found, copied, and checked against the model's vocabulary."""

import os
import shutil
from collections.abc import Sequence

from tree_ffn.data.special_tokens import Said
from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.errors import InputError, check_not_pointer
from tree_ffn.paths import local, split_at_commas

TEMPLATE = "chat_template.jinja"
# What a Hugging Face directory may have; tokenizer.json, or the next two, are enough to encode text.
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "generation_config.json", TEMPLATE)  # fmt: skip
# Tables are padded to a multiple of a round number, none of those in use is larger.
MOST_PADDING = 1024


def find(directory: str) -> str | None:
    """What `data.tokenizer` would say for the files in a directory (names only); None if none are there."""
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        if all(os.path.isfile(os.path.join(directory, name)) for name in names):
            return ",".join(names)
    return None


def beside(directory: str, text: str) -> str:
    """`text` with the paths of the files in `directory`, if they are all there; else `text`.

    Example:
      >>> beside("tests", "__init__.py"), beside("tests", "bytes")
      ('tests/__init__.py', 'bytes')
    """
    paths = [os.path.join(directory, name.strip()) for name in text.split(",")]
    return ",".join(paths) if text and all(map(os.path.isfile, paths)) else text


def directory_of(text: str) -> str:
    """The directory of the files that `text` names, as `data.tokenizer` does.

    Example:
      >>> directory_of("opt/vocab.json,opt/merges.txt")
      'opt'
    """
    return os.path.dirname(local(split_at_commas(text)[0], "data.tokenizer"))


def copy(paths: list[str], directory: str) -> None:
    """Copies files into a directory.

    Raises:
      InputError: it cannot be done.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        for path in paths:
            to = os.path.join(directory, os.path.basename(path))
            if not (os.path.exists(to) and os.path.samefile(path, to)):
                shutil.copyfile(path, to)
    except OSError as error:
        raise InputError(f"--to: {directory!r} cannot be written: {error.strerror or error}.") from None


def files_in(directory: str, names: Sequence[str] = FILES) -> list[str]:
    """Paths of the tokenizer files that a directory has.

    Raises:
      InputError: one is a pointer of git-lfs, or cannot be read.
    """
    paths = [os.path.join(directory, name) for name in names]
    paths = [path for path in paths if os.path.isfile(path)]
    for path in paths:
        try:
            with open(path, "rb") as file:
                check_not_pointer(path, file.read(40))
        except OSError as error:
            raise InputError(f"--from: {path!r} cannot be read: {error.strerror}.") from None
    return paths


def check_fit(tokenizer: Tokenizer, said: Said, beside: bool = False) -> None:
    """Raises InputError unless a tokenizer can be that of a Hugging Face checkpoint.

    Its ids must be rows of the token table, and nearly all of them if it is not the one `beside` the model;
    its end token must be the model's: GPT-2's files have as many tokens as OPT's, in another order.

    Args:
      tokenizer: the one to check.
      said: rows and end tokens, as the checkpoint says.
      beside: its files lie beside the model's.
    """
    rows, ends = said.rows, said.end_ids
    if rows is not None and tokenizer.vocab_size > rows and beside:
        raise InputError(
            f"--from: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's table "
            f"{rows} rows; take the tokens from id {rows} on out of the tokenizer's files, or give the table "
            "rows for them (resize_token_embeddings of transformers) and train those."
        )
    if rows is not None and not (beside or rows - MOST_PADDING < tokenizer.vocab_size <= rows):
        raise InputError(
            f"--tokenizer: {tokenizer.name} has {tokenizer.vocab_size} tokens, which does not fit the {rows} "
            "rows of the model's vocabulary; name the model's own tokenizer."
        )
    if ends and tokenizer.end_id not in ends:
        raise InputError(
            f"--tokenizer: {tokenizer.name} ends a document with token {tokenizer.end_id}, the model with "
            f"{', '.join(map(str, ends))}; name the model's own tokenizer, or correct eos_token_id in its "
            "config.json."
        )
