"""Small tokenizers of the kinds that there are, made here by the library."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tree_ffn.data.tokenizers import FileTokenizer

TEXTS = ("the tree stands by the river", "the root drinks, the leaves fall by the tree")
KINDS = ("byte level", "byte fallback", "low lines", "unigram", "word piece")
END = "</s>"


@functools.cache
def tokenizer_json(kind: str) -> str:
    """tokenizer.json of a kind.

    `byte level` is GPT-2's, `byte fallback` Llama's, `low lines` byte pairs of SentencePiece's kind that drop
    what they do not know, `unigram` T5's and `word piece` BERT's, which have an unknown token.
    """
    return {
        "byte level": _byte_level, "byte fallback": _byte_fallback, "low lines": _low_lines,
        "unigram": _unigram, "word piece": _word_piece,
    }[kind]().to_str()  # fmt: skip


def file_tokenizer(kind: str) -> FileTokenizer:
    """One of them, as programs have it."""
    return FileTokenizer(tokenizers.Tokenizer.from_str(tokenizer_json(kind)), kind, kind)


def _byte_level():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    _train(made, trainer)
    return made


def _low_lines():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    _train(made, trainers.BpeTrainer(vocab_size=60, special_tokens=[END], show_progress=False))
    return made


def _byte_fallback():
    draft = tokenizers.Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(draft, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learnt = json.loads(draft.to_str())["model"]
    words = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, *learnt["vocab"]]))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(words[:3])
    return made


def _unigram():
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = {"special_tokens": ["<unk>", END], "unk_token": "<unk>", "show_progress": False}
    _train(made, trainers.UnigramTrainer(vocab_size=50, **special))
    return made


def _word_piece():
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    _train(made, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", END], show_progress=False))
    return made


def _train(made, trainer) -> None:
    made.train_from_iterator(TEXTS * 4, trainer)
