"""From text to rows of tokens: made once, kept under a hash of all that went in."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tree_ffn.data.cache import RowSource, open_npy, read_meta, write_rows
from tree_ffn.data.documents import SEGMENT_CHARS
from tree_ffn.data.lost import Lost
from tree_ffn.data.packing import SPLITS, choose_splits
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import Inputs, checksums, find_inputs
from tree_ffn.data.tokenise import token_dtype, tokenise
from tree_ffn.data.tokenizers import Tokenizer, load_tokenizer
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.json_output import json_text
from tree_ffn.locks import locked
from tree_ffn.paths import writing
from tree_ffn.progress import Progress

META = "meta.json"
CHECKSUMS = "SHA256SUMS"
# Part of every key: a change to how rows are made from the same inputs counts it up.
ROWS_VERSION = 2

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """Rows ready to train on.

    Attributes:
      directory: where they, or their description, are kept.
      meta: corpus, sha256, tokenizer, tokenizer_sha256, vocab_size, end_id,
        row_tokens, dtype, format, documents, splits (rows, tokens and bytes of
        `train` and `valid`), bytes_per_token (of `valid`); for python_stdlib
        also python and files_left_out.
      tokenizer: what made the tokens.
      train, valid: the rows.
      lost: a line on characters that have no token; empty if all have.
    """

    directory: Path
    meta: dict
    tokenizer: Tokenizer
    train: RowSource
    valid: RowSource

    @property
    def lost(self) -> str:
        return str(self.meta.get("lost", ""))


def prepare(spec: CorpusSpec, row_tokens: int, log: Log = print) -> PreparedCorpus:
    """Makes the rows of a corpus, or finds them made.

    A killed preparation goes on where it was. Two at once wait for each other.

    Bits per byte of the valid split are `loss / ln 2 / bytes_per_token`, with
    the loss in nats a token. An end token has no bytes, but its loss counts:
    where a document ends is part of what has to be predicted. Characters that have
    no token have no bytes either (`tree_ffn.data.lost`).

    Args:
      spec: text, tokenizer and place.
      row_tokens: C + 1, the model's context and one token more.
      log: takes lines on what is going on; when all is there, only what is to be known of it.

    Raises:
      InputError: the text, the tokenizer or the cache directory cannot be used.

    Example:
      corpus = prepare(CorpusSpec(corpus="files", files="texts/*.txt.xz"), row_tokens=257)
    """
    check_positive_int("model.max_seq_len", row_tokens - 1)
    tokenizer = load_tokenizer(spec.tokenizer)
    inputs, in_place = _find(spec, row_tokens, tokenizer)
    for line in inputs.notes:
        log(line)
    facts = {
        "corpus": inputs.name,
        "sha256": inputs.sha256,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "row_tokens": row_tokens,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "format": "tfds" if in_place else "memory",
        **inputs.facts,
    }
    cache = Path(spec.cache_dir)
    directory = cache / f"{inputs.name}-{_key(spec, inputs, facts, tokenizer.losses is not None)[:16]}"
    if not (directory / META).exists():
        waits = lambda holder: log(f"{directory} is being prepared by {holder}; waits until it is done")
        with writing(spec.cache_dir, "data.cache_dir"):
            cache.mkdir(parents=True, exist_ok=True)
            with locked(f"{directory}.lock", waits):
                if not (directory / META).exists():
                    _make(directory, facts, inputs, in_place, tokenizer, spec, log)
    meta = read_meta(directory / META, facts)
    train, valid = (in_place[split] if in_place else _opened(directory, split, meta) for split in SPLITS)
    corpus = PreparedCorpus(directory, meta, tokenizer, train, valid)
    if corpus.lost:
        log(corpus.lost)
    return corpus


def _opened(directory: Path, split: str, meta: dict) -> RowSource:
    shape = (meta["splits"][split]["rows"], meta["row_tokens"])
    return open_npy(directory / f"{split}.npy", shape, np.dtype(meta["dtype"]), meta["vocab_size"])


def _find(
    spec: CorpusSpec, row_tokens: int, tokenizer: Tokenizer
) -> tuple[Inputs, dict[str, RowSource] | None]:
    """The inputs, and for a TFDS data set of tokens the rows that are there already."""
    if spec.corpus != "tfds":
        return find_inputs(spec), None
    try:
        from tree_ffn.data import tfds_input
    except ImportError as error:
        raise InputError(
            "data.corpus: 'tfds' needs the packages tensorflow-datasets and array-record; "
            "install them or use 'files'."
        ) from error
    builder = tfds_input.open_builder(spec)
    has_tokens = tfds_input.has_tokens(builder, spec)
    rows = tfds_input.token_rows(builder, spec, row_tokens, tokenizer.vocab_size) if has_tokens else None
    return tfds_input.dataset_inputs(builder, spec), rows


def _key(spec: CorpusSpec, inputs: Inputs, facts: dict, loses: bool) -> str:
    """A hash of all that decides the rows."""
    made_from = {
        "version": ROWS_VERSION,
        "listing": inputs.listing,
        "text_field": spec.text_field,
        "valid_share": spec.valid_share,
        "segment": SEGMENT_CHARS,
        **({"lost": 1} if loses else {}),
        **{name: facts[name] for name in ("tokenizer_sha256", "row_tokens", "format")},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _make(
    directory: Path,
    facts: dict,
    inputs: Inputs,
    in_place: dict[str, RowSource] | None,
    tokenizer: Tokenizer,
    spec: CorpusSpec,
    log: Log,
) -> None:
    """Makes the directory aside, and puts it into place in one step."""
    started = time.monotonic()
    log(f"preparing corpus {inputs.name} in {directory}")
    work = directory.with_name(f"{directory.name}.partial")
    made = work / "rows"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    if in_place:
        documents, lost = None, ""
        counts = {name: _scanned(source, tokenizer, name, log) for name, source in in_place.items()}
    else:
        parts = tokenise(inputs.sources, tokenizer, work / "parts", log)
        splits = choose_splits(parts, facts["row_tokens"], spec.valid_share)
        write_rows(made, splits, np.dtype(facts["dtype"]), log)
        lost = sum((part.lost for part in parts), Lost()).said()
        documents = sum(split.documents for split in splits.values())
        counts = {
            name: {"rows": split.n_rows, "tokens": split.tokens, "bytes": split.bytes}
            for name, split in splits.items()
        }
    meta = (
        facts
        | ({"lost": lost} if lost else {})
        | {
            "documents": documents,
            "splits": counts,
            "bytes_per_token": counts["valid"]["bytes"] / counts["valid"]["tokens"],
        }
    )
    (made / CHECKSUMS).write_text(checksums(inputs.listing), encoding="utf-8")
    (made / META).write_text(json_text(meta, META, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)  # there only if somebody removed its description
    os.replace(made, directory)
    shutil.rmtree(work)
    rows = " + ".join(f"{counts[split]['rows']:,} {split}" for split in SPLITS)
    log(f"prepared {rows} rows in {time.monotonic() - started:.0f} s")


def _scanned(source: RowSource, tokenizer: Tokenizer, name: str, log: Log) -> dict:
    """Reads rows that others made, all of them once, and counts.

    A row's first token is no target and not counted. A row may begin inside a
    character, so the bytes are exact to within a few a row. An unknown token has none.
    """
    unknown = tokenizer.losses.unknown_id if tokenizer.losses else None
    n_bytes = 0

    def size(rows: np.ndarray) -> int:
        known = ([token for token in row.tolist() if token != unknown] for row in rows)
        return sum(len(tokenizer.decode(ids).encode()) for ids in known)

    with Progress(f"checking {name}", len(source), "row", log) as progress:
        for start in range(0, len(source), 1024):
            rows = source.rows(np.arange(start, min(start + 1024, len(source))))
            n_bytes += size(rows) - size(rows[:, :1])  # behind the first token a word's space counts
            progress.to(start + len(rows))
    return {"rows": len(source), "tokens": len(source) * (source.row_tokens - 1), "bytes": n_bytes}
