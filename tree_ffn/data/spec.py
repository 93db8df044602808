"""What a corpus is made from: the `data` part of a config, as a frozen value."""

import dataclasses

from tree_ffn.errors import InputError, check_choice, check_positive_int

CORPORA = ("python_stdlib", "files", "tfds")
FORMATS = ("auto", "array_record", "memory")


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """Text, tokenizer and place of a corpus.

    Attributes:
      corpus: `python_stdlib` (the running Python's own library), `files`, or
        `tfds`.
      files, valid_files: of `files`: glob patterns, comma separated (`**`
        descends); plain text, or JSONL where the name ends in .jsonl, each
        also packed as .gz, .xz, .zst. What matches `valid_files` is never
        trained on.
      text_field: of JSONL: the field that holds the text.
      tfds_dir: of `tfds`: a prepared directory (the one with
        dataset_info.json); with `tfds_name`, where prepared sets are kept.
      tfds_name: of `tfds`: a registered name, such as `ag_news_subset`.
      tokenizer: see `tokenizers.load_tokenizer`.
      cache_dir: where prepared rows are kept.
      valid_share: share of the documents held out where no split is named.
      format: of the prepared rows: `array_record`, `memory` (a NumPy file), or
        `auto`: the first of them whose packages are installed.
      workers: threads that read rows ahead; 0 reads in the caller's thread.
    """

    corpus: str = "python_stdlib"
    files: str = ""
    valid_files: str = ""
    text_field: str = "text"
    tfds_dir: str = ""
    tfds_name: str = ""
    tokenizer: str = "bytes"
    cache_dir: str = "data_cache"
    valid_share: float = 0.05
    format: str = "auto"
    workers: int = 2

    def __post_init__(self):
        check_choice("data.corpus", self.corpus, CORPORA)
        check_choice("data.format", self.format, FORMATS)
        check_positive_int("data.workers", self.workers, least=0)
        if not 0 < self.valid_share < 1:
            raise InputError(
                f"data.valid_share: {self.valid_share!r} is not allowed; use a number between 0 and 1."
            )
        if not self.cache_dir:
            raise InputError("data.cache_dir: '' is not allowed; name a directory.")
        if self.corpus == "files" and not self.files:
            raise InputError("data.files: '' is not allowed with data.corpus=files; name text files.")
        if self.corpus == "tfds" and not (self.tfds_dir or self.tfds_name):
            raise InputError(
                "data.tfds_dir: '' is not allowed with data.corpus=tfds; name it or data.tfds_name."
            )


def corpus_spec_from_config(config) -> CorpusSpec:
    """The `data` part of a config as a checked `CorpusSpec`.

    Args:
      config: anything with a mapping `config.data` that has every field of
        `CorpusSpec`.

    Raises:
      InputError: names the field, its value and what is allowed.
    """
    return CorpusSpec(**{field.name: config.data[field.name] for field in dataclasses.fields(CorpusSpec)})
