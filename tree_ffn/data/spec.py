"""What a corpus is made from: the `data` part of a config, as a frozen value."""

import dataclasses
from typing import Any

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.paths import local, local_each
from tree_ffn.plain import plain

CORPORA = ("python_stdlib", "files", "tfds")
# Corpora by the fields that are named; where none is, `named` asks for files.
BY_FIELDS = {"auto": "python_stdlib", "named": "files"}
# Fields that only one corpus reads.
FIELDS_OF = {"files": ("files", "valid_files"), "tfds": ("tfds_dir", "tfds_name")}


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """Text, tokenizer and place of a corpus.

    Attributes:
      corpus: `python_stdlib` (the running Python's own library), `files`, or
        `tfds`; `auto` becomes the one that the fields below ask for, or else
        `python_stdlib`; `named` is `auto` that takes no text unasked.
      files: of `files`: glob patterns, comma separated (`**` descends), or
        paths; `data.formats` says which names are read as what.
      valid_files: of `files`: the same, of what is held out and never trained
        on; none: `valid_share` of the documents.
      text_field: of JSON and parquet: the field that holds the text.
      tfds_dir: of `tfds`: a prepared directory (the one with
        dataset_info.json); with `tfds_name`, where prepared sets are kept.
      tfds_name: of `tfds`: a registered name, such as `ag_news_subset`.
      tokenizer: `bytes`, a tokenizer.json, or `vocab.json,merges.txt` (see
        `tokenizers.load_tokenizer`).
      cache_dir: where prepared rows are kept.
      valid_share: share of the documents held out where no split is named.
      workers: threads that read rows ahead; 0 reads in the caller's thread.
    """

    corpus: str = "auto"
    files: str = ""
    valid_files: str = ""
    text_field: str = "text"
    tfds_dir: str = ""
    tfds_name: str = ""
    tokenizer: str = "bytes"
    cache_dir: str = "data_cache"
    valid_share: float = 0.05
    workers: int = 2

    def __post_init__(self):
        check_choice("data.corpus", self.corpus, (*CORPORA, *BY_FIELDS))
        named = (self.files, self.tfds_dir, self.tfds_name)
        object.__setattr__(self, "corpus", corpus_of(self.corpus, *named))
        check_positive_int("data.workers", self.workers, least=0)
        if not 0 < self.valid_share < 1:
            raise InputError(
                f"data.valid_share: {self.valid_share!r} is not allowed; use a number between 0 and 1."
            )
        if not self.cache_dir:
            raise InputError("data.cache_dir: '' is not allowed; name a directory.")
        if self.corpus == "files" and not self.files:
            raise InputError(
                "data.files: '' is not allowed with data.corpus=files; name text files, or ask for the "
                "embedded corpus by data.corpus=python_stdlib."
            )
        if self.corpus == "tfds" and not (self.tfds_dir or self.tfds_name):
            raise InputError(
                "data.tfds_dir: '' is not allowed with data.corpus=tfds; name it or data.tfds_name."
            )
        self._refuse_fields_of_others()
        for name in ("tfds_dir", "cache_dir"):
            object.__setattr__(self, name, local(getattr(self, name), f"data.{name}"))
        for name in ("files", "valid_files"):
            object.__setattr__(self, name, local_each(getattr(self, name), f"data.{name}"))

    def _refuse_fields_of_others(self):
        """Text that is named and would not be read is a mistake."""
        for corpus, names in FIELDS_OF.items():
            for name in names:
                value = getattr(self, name)
                if value and corpus != self.corpus:
                    raise InputError(
                        f"data.{name}: {value!r} needs data.corpus={corpus!r}; "
                        f"data.corpus is {self.corpus!r}."
                    )


def corpus_of(corpus: str, files: str, tfds_dir: str, tfds_name: str) -> str:
    """The corpus that the fields of a `CorpusSpec` ask for; another than those of `BY_FIELDS` stands.

    Args:
      corpus: `CorpusSpec.corpus` as it is written.
      files: glob patterns; '' names none.
      tfds_dir: a directory; '' names none.
      tfds_name: a registered name; '' names none.

    Example:
      >>> corpus_of("auto", "a.txt", "", ""), corpus_of("auto", "", "", ""), corpus_of("tfds", "", "", "")
      ('files', 'python_stdlib', 'tfds')
    """
    if corpus not in BY_FIELDS:
        return corpus
    if files:
        return "files"
    return "tfds" if tfds_dir or tfds_name else BY_FIELDS[corpus]


def with_corpus(config: dict[str, Any]) -> dict[str, Any]:
    """A config as plain values that says which corpus it reads."""
    data, names = config.get("data"), ("corpus", "files", "tfds_dir", "tfds_name")
    if not isinstance(data, dict) or not data.keys() >= set(names):
        return config
    return {**config, "data": {**data, "corpus": corpus_of(*(data[name] for name in names))}}


def corpus_spec_from_config(config) -> CorpusSpec:
    """The `data` part of a config as a checked `CorpusSpec`.

    Args:
      config: with a section `data` that has every field of `CorpusSpec`.

    Raises:
      InputError: names the field, its value and what is allowed.
    """
    data = plain(config.data)
    return CorpusSpec(**{field.name: data[field.name] for field in dataclasses.fields(CorpusSpec)})
