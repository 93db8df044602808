"""Questions with answers as rows of tokens: one a row, and only the answer is to be predicted.

A row is: end token, prompt, answer, end token, and end tokens up to the context. A token that is read but
does not count as a target is kept as -1 - id, so that a row is still one array of int32
(`training.finetune.read_rows`).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tree_ffn.data.cache import ArrayRows
from tree_ffn.data.corpus import Log, PreparedCorpus
from tree_ffn.data.documents import key_of
from tree_ffn.data.formats import read_rows, text_under
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import content_hash, named_texts
from tree_ffn.data.tokenizers import Tokenizer, load_tokenizer
from tree_ffn.errors import InputError


def question_row(prompt: np.ndarray, answer: np.ndarray, end_id: int, row_tokens: int) -> np.ndarray:
    """The row of one question; a prompt that is too long loses its beginning.

    Args:
      prompt: its tokens.
      answer: its tokens; they and two end tokens fit into the row.
      end_id: the end token.
      row_tokens: C + 1.
    """
    room = row_tokens - 2 - len(answer)
    read = np.concatenate([[end_id], prompt[max(0, len(prompt) - room) :]])
    row = np.full(row_tokens, -1 - end_id, np.int32)
    row[: len(read)] = -1 - read
    row[len(read) : len(read) + len(answer) + 1] = [*answer, end_id]
    return row


def prepare_questions(
    spec: CorpusSpec, row_tokens: int, prompt_field: str, answer_field: str, log: Log = print
) -> PreparedCorpus:
    """The rows of files of JSON or parquet with a prompt and an answer each; nothing is kept on disk.

    Questions are held out as documents are: those of `valid_files`, or by a hash of the prompt.

    Args:
      spec: `files`, `valid_files`, `valid_share` and `tokenizer` are read.
      row_tokens: C + 1.
      prompt_field: where a row has its prompt.
      answer_field: where it has its answer.
      log: takes a line on each file that holds the same as another.

    Raises:
      InputError: a row has not both texts, an answer does not fit into a row, or a split is empty.
    """
    if not spec.files:
        raise InputError("data.files: '' is not allowed with finetune.task='qa'; name files of JSON lines.")
    tokenizer = load_tokenizer(spec.tokenizer)
    texts = named_texts(spec)
    train, valid = texts.train, texts.valid
    for line in texts.notes:
        log(line)
    rows: dict[str, list] = {"train": [], "valid": []}
    n_bytes = dict.fromkeys(rows, 0)
    for path in [*train, *valid]:
        for place, prompt, answer in _pairs(path, prompt_field, answer_field):
            key = key_of(hashlib.sha256(prompt.encode()).digest())
            held_out = path in valid if valid else key < spec.valid_share * 2**64
            split = "valid" if held_out else "train"
            ids = tokenizer.encode(answer)
            if len(ids) > row_tokens - 2:
                raise InputError(
                    f"{place}: the answer has {len(ids)} tokens; the model's context has room "
                    f"for {row_tokens - 2}."
                )
            rows[split].append(question_row(tokenizer.encode(prompt), ids, tokenizer.end_id, row_tokens))
            n_bytes[split] += len(answer.encode())
    for split in rows:
        if not rows[split]:
            raise InputError(f"data.files: no question is left for the split {split!r}; name more questions.")
    listing = [(path.name, texts.hashes[path], "valid" if path in valid else "") for path in [*train, *valid]]
    arrays = {split: np.stack(part) for split, part in rows.items()}
    meta = _facts(listing, tokenizer, row_tokens, arrays, n_bytes)
    return PreparedCorpus(Path(), meta, tokenizer, ArrayRows(arrays["train"]), ArrayRows(arrays["valid"]))


def _facts(listing, tokenizer: Tokenizer, row_tokens: int, arrays: dict, n_bytes: dict) -> dict:
    tokens = {split: int((rows[:, 1:] >= 0).sum()) for split, rows in arrays.items()}
    return {
        "corpus": "questions",
        "sha256": content_hash(listing),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "row_tokens": row_tokens,
        "splits": {
            split: {"rows": len(rows), "tokens": tokens[split], "bytes": n_bytes[split]}
            for split, rows in arrays.items()
        },
        "bytes_per_token": 0.0,  # a loss is a mean over questions: it has no bits per byte
    }


def _pairs(path: Path, prompt_field: str, answer_field: str) -> Iterator[tuple[str, str, str]]:
    """(place, prompt, answer) of a file."""
    fields = prompt_field, answer_field
    for place, row in read_rows(path, f"data.files: {path}", fields):
        prompt, answer = (text_under(place, row, field) for field in fields)
        if prompt is None or not answer:
            raise InputError(
                f"{place}: no texts under {prompt_field!r} and {answer_field!r}; "
                "finetune.prompt_field and finetune.answer_field name them."
            )
        yield place, prompt, answer
