"""Text to batches: corpora, tokenizers, prepared rows, and the order they are read in."""

from tree_ffn.data.corpus import PreparedCorpus, prepare
from tree_ffn.data.pipeline import Batches, row_order, valid_batches
from tree_ffn.data.spec import CorpusSpec, corpus_spec_from_config
from tree_ffn.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batches",
    "CorpusSpec",
    "PreparedCorpus",
    "Tokenizer",
    "corpus_spec_from_config",
    "load_tokenizer",
    "prepare",
    "row_order",
    "valid_batches",
]
