"""From tokenised parts to rows: which text is held out, and where rows begin.

A split is one stream of documents, each followed by the end token. Its rows
are `stream[i * C : i * C + C + 1]`: neighbours share one token, so every token
but the first is a target exactly once. What does not fill a last row is left.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from tree_ffn.data.tokenise import Part
from tree_ffn.errors import InputError

SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of the parts.

    Attributes:
      name: `train` or `valid`.
      chosen: (part, bool [n]): the segments of each part that belong to it.
      row_tokens: C + 1.
    """

    name: str
    chosen: list[tuple[Part, np.ndarray]]
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of the stream, end tokens included."""
        return sum(int(part.counts[mask].sum()) for part, mask in self.chosen)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text; an end token counts as none."""
        return sum(int(part.sizes[mask].sum()) for part, mask in self.chosen)

    @property
    def documents(self) -> int:
        """Documents that end in the split."""
        return sum(int(part.ends[mask].sum()) for part, mask in self.chosen)

    @property
    def n_rows(self) -> int:
        """Whole rows of the stream."""
        return max(self.tokens - 1, 0) // (self.row_tokens - 1)

    def rows(self) -> Iterator[np.ndarray]:
        """All rows, in blocks [n, C + 1]."""
        width = self.row_tokens - 1
        held = None
        for part, mask in self.chosen:
            if not mask.any():
                continue
            fresh = part.tokens()[np.repeat(mask, part.counts)]
            stream = fresh if held is None else np.concatenate([held, fresh])
            n = max(len(stream) - 1, 0) // width
            if n:
                after = stream[width : n * width + 1 : width]
                yield np.concatenate([stream[: n * width].reshape(n, width), after[:, None]], axis=1)
            held = stream[n * width :]


class TooShort(InputError):
    """A text that gives no row to train on, or none to hold out."""


def choose_splits(parts: list[Part], row_tokens: int, valid_share: float) -> dict[str, Split]:
    """Divides the segments of all parts between `train` and `valid`.

    Sources with a split of their own keep it. The others are divided by
    document, hash below `valid_share` to `valid`; where that leaves either
    without a full row (one long text, a handful of files), the last
    `valid_share` of the bytes is held out.

    Args:
      parts: of all sources, in order.
      row_tokens: C + 1.
      valid_share: of the documents to hold out, above 0 and below 1.

    Raises:
      InputError: there is no text.
      TooShort: there is too little for a row of each split.
    """
    if not any(part.sizes.sum() for part in parts):
        raise InputError("data: the corpus is empty; use files that hold text.")
    borders = np.cumsum([len(part.sizes) for part in parts])[:-1]
    for rule in (_by_key, _by_tail):
        masks = np.split(rule(_Segments(parts), row_tokens, valid_share), borders)
        splits = {
            "train": Split("train", list(zip(parts, [~mask for mask in masks])), row_tokens),
            "valid": Split("valid", list(zip(parts, masks)), row_tokens),
        }
        short = [split for split in splits.values() if not split.n_rows]
        if not short:
            return splits
    raise TooShort(
        f"data: the {short[0].name} split has {short[0].tokens} tokens and a row needs {row_tokens}; "
        "use more text, a smaller model.max_seq_len, or name data.valid_files."
    )


class _Segments:
    """All segments of all parts, as columns of one table."""

    def __init__(self, parts: list[Part]):
        join = lambda name: np.concatenate([getattr(part, name) for part in parts])
        self.counts, self.sizes, self.ends, self.keys = map(join, ("counts", "sizes", "ends", "keys"))
        of_source = lambda split: np.repeat(
            [part.split == split for part in parts], [len(part.sizes) for part in parts]
        )
        self.free, self.valid = of_source(""), of_source("valid")


def _by_key(table: _Segments, row_tokens: int, valid_share: float) -> np.ndarray:
    """bool [segments], the held-out ones: of documents whose key is low.

    A document that alone would be more than half of the held-out text stays in
    `train`: a split that is mostly one long text says little about the rest.
    """
    document = np.cumsum(table.ends) - table.ends
    size = np.bincount(document, weights=table.sizes)
    low = table.keys[table.ends] < np.uint64(valid_share * 2.0**64)
    chosen = low & (size <= valid_share / 2 * table.sizes[table.free].sum())
    return table.valid | (table.free & chosen[document])


def _by_tail(table: _Segments, row_tokens: int, valid_share: float) -> np.ndarray:
    """bool [segments], the held-out ones: the last, until they are enough bytes and one row."""
    behind = lambda column: np.cumsum((column * table.free)[::-1])[::-1] - column
    wanted_bytes = valid_share * table.sizes[table.free].sum()
    last = (behind(table.sizes) < wanted_bytes) | (behind(table.counts) < row_tokens)
    return table.valid | (table.free & last)
