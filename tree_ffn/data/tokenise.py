"""Tokenising in parts that survive being killed.

Each source becomes a run of part files in a work folder, every one written
under another name and then renamed, so that a part is there completely or not
at all. A second call reads what is there and goes on behind it.
"""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tree_ffn.data.documents import Segment
from tree_ffn.data.lost import MOST_LOST, MOST_LOST_EARLY, Lost
from tree_ffn.data.text_files import Source
from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.progress import Progress

PART_CHARS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Part:
    """The counts of one part file; `tokens()` reads its tokens.

    Attributes:
      path: the file.
      split: of its source.
      counts: int64 [n], tokens of each segment, the end token included.
      sizes: int64 [n], UTF-8 bytes of each segment's text but of lost characters; an
        end token has none.
      ends: bool [n], whether a document ends with the segment.
      keys: uint64 [n], the documents' keys where they end.
      last: whether the source ends here.
      lost: the characters that have no token.
    """

    path: Path
    split: str
    counts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    last: bool
    lost: Lost = Lost()

    def tokens(self) -> np.ndarray:
        """The tokens, [sum of counts] of the corpus' dtype."""
        with np.load(self.path) as arrays:
            return arrays["tokens"]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def tokenise(
    sources: list[Source], tokenizer: Tokenizer, folder: Path, log: Callable[[str], None]
) -> list[Part]:
    """Tokenises what is not yet in `folder`.

    Args:
      sources: the text.
      tokenizer: encodes it; every document is followed by its `end_id`.
      folder: of the part files; the same sources and tokenizer each time.
      log: takes progress lines.

    Returns:
      All parts in order.

    Raises:
      InputError: too many characters have no token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    lost, before = Lost(), 0
    with Progress("tokenising", sum(source.stored_bytes for source in sources), "B", log) as progress:
        for number, source in enumerate(sources):
            on_stored = lambda position, before=before: progress.to(before + position)
            for part in _source_parts(source, folder / f"{number:05d}", tokenizer, on_stored):
                parts.append(part)
                lost += part.lost
                lost.check(tokenizer.name, MOST_LOST_EARLY)
            before += source.stored_bytes
            progress.to(before)
    lost.check(tokenizer.name, MOST_LOST)
    return parts


def _source_parts(source: Source, stem: Path, tokenizer: Tokenizer, on_stored) -> Iterator[Part]:
    done = _existing(stem, source.split)
    yield from done
    if done and done[-1].last:
        return
    skip = sum(len(part.counts) for part in done)
    groups = _groups(source.read(on_stored), skip)
    for number, (group, last) in enumerate(groups, start=len(done)):
        yield _write(_part_path(stem, number), source.split, group, last, tokenizer)


def _groups(segments: Iterator[Segment], skip: int) -> Iterator[tuple[list[Segment], bool]]:
    """Segments behind the first `skip` in groups of about `PART_CHARS`; the last group may be empty."""
    group, chars = [], 0
    for number, segment in enumerate(segments):
        if number < skip:
            continue
        group.append(segment)
        chars += len(segment.text)
        if chars >= PART_CHARS:
            yield group, False
            group, chars = [], 0
    yield group, True


def _existing(stem: Path, split: str) -> list[Part]:
    done: list[Part] = []
    while (path := _part_path(stem, len(done))).exists():
        try:
            done.append(_read(path, split))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            break  # a machine that lost power may leave a part without its content: made again
    return done


def _part_path(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}-{number:06d}.npz")


def _read(path: Path, split: str) -> Part:
    with np.load(path) as arrays:
        columns = {name: arrays[name] for name in ("counts", "sizes", "ends", "keys")}
        n, of, first = arrays["lost"].tolist()
        lost = Lost(n, of, chr(first) if n else "")
        return Part(path, split, last=bool(arrays["last"]), lost=lost, **columns)


def _write(path: Path, split: str, group: list[Segment], last: bool, tokenizer: Tokenizer) -> Part:
    encoded = tokenizer.encode_batch([segment.text for segment in group])
    end = np.array([tokenizer.end_id], np.int32)
    ids = [
        piece for one, segment in zip(encoded, group) for piece in ((one, end) if segment.ends else (one,))
    ]
    ends = np.array([segment.ends for segment in group], bool)
    found = [Lost.count(tokenizer.losses, segment.text, one) for segment, one in zip(group, encoded)]
    lost = sum((one for one, _ in found), Lost())
    columns = {
        "counts": np.array([len(one) for one in encoded], np.int64) + ends,
        "sizes": np.array([size for _, size in found], np.int64),
        "ends": ends,
        "keys": np.array([segment.key for segment in group], np.uint64),
    }
    tokens = np.concatenate([*ids, end[:0]]).astype(token_dtype(tokenizer.vocab_size))
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        # The character as a number: NumPy's strings end at a NUL.
        as_array = np.array([lost.n, lost.of, ord(lost.first or "\0")], np.int64)
        np.savez(file, tokens=tokens, last=np.bool_(last), lost=as_array, **columns)
    os.replace(unfinished, path)
    return Part(path, split, last=last, lost=lost, **columns)
