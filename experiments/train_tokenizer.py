"""Trains a byte-pair tokenizer on text: for small models, most of which a table of 50,000 tokens would be.

    python -m experiments.train_tokenizer --files='texts/*.txt.xz' --vocab=4096 --to=tokenizer.json
    python -m experiments.train --config=configs/quickstart.py --config.data.files='texts/*.txt.xz' \
        --config.data.tokenizer=tokenizer.json --workdir=runs/words

Byte-level, as GPT-2's: any text can be encoded, and what is decoded is what was encoded. The end of a
document is the token `<|endoftext|>`. The same text gives the same file.
"""

import os
from collections.abc import Iterator

from absl import flags

from experiments.common import cli, path_flags
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.data.text_files import file_inputs
from tree_ffn.errors import InputError, reason

END = "<|endoftext|>"
LEAST = 257  # every byte, and the end

_FILES = path_flags.define_each(
    "files", None, "Text: glob patterns, comma separated; plain text, JSON lines or parquet, packed or not."
)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Of JSON and parquet.")
_VOCAB = flags.DEFINE_integer("vocab", 4096, "Tokens, the 256 bytes and the end of a document among them.")
_TO = path_flags.define_written("to", None, "The file to write, e.g. tokenizer.json.")


def main() -> None:
    for flag, example in ((_FILES, "texts/*.txt.xz"), (_TO, "tokenizer.json")):
        if not flag.value:
            raise InputError(f"--{flag.name} is missing; name one, e.g. --{flag.name}={example}.")
    if _VOCAB.value < LEAST:
        raise InputError(
            f"--vocab: {_VOCAB.value} is not allowed; use at least {LEAST}, all bytes and the end."
        )
    if os.path.exists(_TO.value):
        raise InputError(f"--to: {_TO.value!r} exists; name a new file.")
    tokenizer = train(segments(_FILES.value, _TEXT_FIELD.value), _VOCAB.value)
    try:
        tokenizer.save(_TO.value)
    except Exception as error:  # the library raises no narrower one
        raise InputError(f"--to: {_TO.value!r} cannot be written ({reason(error)}).") from error
    print(f"{_TO.value}: {tokenizer.get_vocab_size():,} tokens")


def segments(files: str, text_field: str) -> Iterator[str]:
    """The text of files, in order, a part at a time."""
    for source in file_inputs(CorpusSpec(corpus="files", files=files, text_field=text_field)).sources:
        for segment in source.read(lambda position: None):
            yield segment.text


def train(texts: Iterator[str], vocab: int):
    """A `tokenizers.Tokenizer` of at most `vocab` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=True,
        ),
    )  # fmt: skip
    return tokenizer


if __name__ == "__main__":
    cli.run(main)
