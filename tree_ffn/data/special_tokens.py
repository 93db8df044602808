"""What the files beside a tokenizer say of its tokens: which were added, which one ends a text, which pads.

    config.json, generation_config.json              eos_token_id, pad_token_id, vocab_size: the model's word
    tokenizer_config.json, special_tokens_map.json   eos_token, pad_token, ..., added_tokens_decoder
    added_tokens.json                                {token: id}

A config.json may be that of an export of ours, which has the model's vocabulary and, in its meta, `end_id`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.json_input import parse_object

# The token that ends a document, the first of these that the vocabulary has, where no file says it.
# `</s>` comes first: OPT's vocabulary also lists an `<|endoftext|>` that the
# model never saw.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "[EOS]")

NAMED = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_PAD = re.compile(r"\W*pad(ding)?\W*", re.IGNORECASE)
_IN_BRACKETS = re.compile(r"<.+>|\[.+\]")


class Added(NamedTuple):
    """A token that was added to a vocabulary: how it is written, its id, flags of the tokenizers library."""

    content: str
    id: int
    flags: dict[str, bool]

    @property
    def special(self) -> bool:
        """Whether it is never text."""
        return self.flags.get("special", False)


class Said(NamedTuple):
    """What is said of a tokenizer.

    Attributes:
      end_ids: rows of the model's table, by its files; the first counts most.
      end, begin: tokens, by the tokenizer's files.
      begins: whether they say that every text begins with `begin`; None: they do not say.
      pads: tokens that pad, and ids of such.
      rows: of the model's token table.
      added: tokens, by id.
      special: tokens that have a name (`sep_token`) or are listed as special.
    """

    end_ids: tuple[int, ...] = ()
    end: str | None = None
    begin: str | None = None
    begins: bool | None = None
    pads: frozenset[str | int] = frozenset()
    rows: int | None = None
    added: tuple[Added, ...] = ()
    special: frozenset[str] = frozenset()

    def is_rowless_pad(self, token: str, number: int) -> bool:
        """Whether a token only pads and has no row in the model's table; transformers loads such pairs."""
        pads = token in self.pads or number in self.pads or _PAD.fullmatch(token)
        ends = token == self.end or number in self.end_ids
        return bool(self.rows is not None and number >= self.rows and pads and not ends)

    def end_of(self, vocabulary: Mapping[str, int], added=()) -> str | None:
        """The token that ends a document: by the model's files, by the tokenizer's, by its name.

        An id of the model's that is an ordinary token is not believed: the tokenizer is another model's.
        """
        control = {*added, *self.special, *END_TOKENS}
        by_id = {number: token for token, number in vocabulary.items()}
        ends = [by_id[number] for number in self.end_ids if number in by_id]
        ends = [token for token in ends if token in control or _IN_BRACKETS.fullmatch(token)]
        if self.end in vocabulary and (self.end in ends or not ends):
            return self.end
        return next(iter(ends), next((token for token in END_TOKENS if token in vocabulary), None))

    def new_tokens(self, vocabulary: Mapping[str, int]) -> list[Added]:
        """The added tokens that a vocabulary lacks, but for pads without a row.

        Raises:
          InputError: a token has another id there, or its id is another token's.
        """
        if not self.added:
            return []
        by_id = {number: token for token, number in vocabulary.items()}
        for one in self.added:
            there = by_id.get(one.id, one.content)
            if vocabulary.get(one.content, one.id) != one.id or there != one.content:
                raise InputError(
                    f"data.tokenizer: the added token {one.content!r} has the id {one.id} by its file, but "
                    f"in the vocabulary that is {there!r}, and the token's id is "
                    f"{vocabulary.get(one.content, 'none')}; make them agree."
                )
        missing = (one for one in self.added if one.content not in vocabulary)
        return [one for one in missing if not self.is_rowless_pad(one.content, one.id)]


NOTHING = Said()


def said_beside(tokenizer: Path, model: Path) -> Said:
    """What the files in the directory of a tokenizer and in that of its model say; files may be missing.

    Raises:
      InputError: a file is no JSON object, or says what is not allowed.
    """
    config, generation = (_object(model / name) for name in ("config.json", "generation_config.json"))
    words, names = (
        _object(tokenizer / name) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if config.get("format") == "tree_ffn":  # an export: what was found when it was made is final
        meta, rows = _in(config, "meta"), _in(config, "model").get("vocab_size")
        theirs = _in(_in(meta, "pretrained"), "config")
        end_ids = _ids(meta.get("end_id", theirs.get("eos_token_id")))
    else:
        end_ids = (*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id")))
        rows = config.get("vocab_size")
    rows = rows if type(rows) is int else None
    named = {name: _content(words.get(name) or names.get(name)) for name in NAMED}
    more = [*_list(words.get("additional_special_tokens")), *_list(names.get("additional_special_tokens"))]
    special = {token for token in (*named.values(), *map(_content, more)) if token}
    begins = words.get("add_bos_token")
    return Said(
        # transformers writes the ids of GPT-2 into every config of its kind, also where no such row is.
        end_ids=tuple(one for one in end_ids if rows is None or one < rows),
        end=named["eos_token"],
        begin=named["bos_token"],
        begins=begins if isinstance(begins, bool) else None,
        pads=frozenset((*_ids(config.get("pad_token_id")), *filter(None, [named["pad_token"]]))),
        rows=rows,
        added=_added(tokenizer, words, special, [*names.values(), *more]),
        special=frozenset(special),
    )


def _added(directory: Path, words: dict, special: set[str], described: list) -> tuple[Added, ...]:
    """The tokens of added_tokens.json, and those of `added_tokens_decoder`, which has their flags."""
    flags = {_content(one): one for one in described if isinstance(one, dict)}
    found = {}
    for content, number in _object(directory / "added_tokens.json").items():
        if type(number) is not int or number < 0 or not content:
            raise InputError(
                f"data.tokenizer: {str(directory / 'added_tokens.json')!r} gives {content!r} the id "
                f"{number!r}; an id is a whole number of at least 0."
            )
        said = flags.get(content, {}) | {"special": content in special}
        found[content] = Added(content, number, {name: bool(said[name]) for name in FLAGS if name in said})
    for number, said in _in(words, "added_tokens_decoder").items():
        content = _content(said)
        if not is_whole_number(number) or not content:
            raise InputError(
                f"data.tokenizer: added_tokens_decoder in {str(directory / 'tokenizer_config.json')!r} has "
                f"the entry {number!r}, which is no id of a token with its content."
            )
        found[content] = Added(
            content, int(number), {name: bool(said[name]) for name in FLAGS if name in said}
        )
    return tuple(sorted(found.values(), key=lambda one: one.id))


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer: {str(path)!r} cannot be read: {error.strerror}.") from None
    return parse_object(content, f"data.tokenizer: {str(path)!r}", finite=False)


def _in(values: dict, name: str) -> dict:
    inner = values.get(name)
    return inner if isinstance(inner, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _ids(value) -> tuple[int, ...]:
    """eos_token_id and the like: an id, several, or none."""
    return tuple(one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _content(token) -> str | None:
    """A token is written as text, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
