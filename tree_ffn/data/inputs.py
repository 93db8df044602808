"""The texts a corpus is made from: found, named by their hashes, ready to read."""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tree_ffn.data.compressed import plain_name, read_bytes, read_chunks
from tree_ffn.data.documents import Segment, decoded, documents, json_documents, key_of, segments
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.errors import InputError

OnStored = Callable[[int], None]
LEFT_OUT_DIRECTORIES = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class Source(NamedTuple):
    """One stream of documents.

    Attributes:
      split: `train`, `valid`, or `` where each document's key decides.
      stored_bytes: for progress.
      read: yields the segments; reports positions up to `stored_bytes`.
    """

    split: str
    stored_bytes: int
    read: Callable[[OnStored], Iterator[Segment]]


class Inputs(NamedTuple):
    """All that a corpus is made from.

    Attributes:
      name: a short name without any path.
      sha256: of the content, as `content_hash` defines it.
      listing: (file name, sha256, split) of each file.
      sources: the streams, in order.
      facts: what else belongs into the corpus' description.
    """

    name: str
    sha256: str
    listing: list[tuple[str, str, str]]
    sources: list[Source]
    facts: dict


def checksums(listing: list[tuple[str, str, str]]) -> str:
    """The listing as `sha256sum` prints it: one line a file, hash and name."""
    return "".join(f"{sha256}  {name}\n" for name, sha256, _ in listing)


def content_hash(listing: list[tuple[str, str, str]]) -> str:
    """The hash of some files: of one its sha256, of more that of their checksums.

    So `sha256sum FILES | sha256sum`, run beside the files and in their order,
    gives the same.
    """
    return listing[0][1] if len(listing) == 1 else hashlib.sha256(checksums(listing).encode()).hexdigest()


def find_inputs(spec: CorpusSpec) -> Inputs:
    """The inputs of a corpus of text, every file hashed."""
    return stdlib_inputs() if spec.corpus == "python_stdlib" else file_inputs(spec)


def stdlib_inputs(root: Path | None = None) -> Inputs:
    """The running Python's standard library, one document a file.

    Files that are not UTF-8 are left out and counted, files without text too.
    A document's split is decided by its relative path.

    Args:
      root: another directory to take *.py from.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts, left_out = {}, 0
    for name, path in _python_files(root):
        try:
            texts[name] = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError:
            left_out += 1
    listing = [(name, hashlib.sha256(text.encode()).hexdigest(), "") for name, text in texts.items()]

    def read(on_stored: OnStored) -> Iterator[Segment]:
        position = 0
        for name, text in texts.items():
            yield from segments([(text, True)], key=key_of(hashlib.sha256(name.encode()).digest()))
            position += len(text)
            on_stored(position)

    return Inputs(
        name="python_stdlib",
        sha256=content_hash(listing),
        listing=listing,
        sources=[Source("", sum(map(len, texts.values())), read)],
        facts={"python": platform.python_version(), "files_left_out": left_out},
    )


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in LEFT_OUT_DIRECTORIES]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in found)


def file_inputs(spec: CorpusSpec) -> Inputs:
    """Text files by glob patterns.

    Raises:
      InputError: a pattern matches no file, or a file cannot be read.
    """
    valid = matches("data.valid_files", spec.valid_files) if spec.valid_files else []
    train = [path for path in matches("data.files", spec.files) if path not in valid]
    split = "train" if valid else ""
    placed = [(path, split) for path in train] + [(path, "valid") for path in valid]
    if not train:
        raise InputError(
            f"data.files: {spec.files!r} matches nothing that data.valid_files leaves; name more."
        )
    listing = [(path.name, file_hash(path), split) for path, split in placed]
    return Inputs(
        name=_directory_names([path for path, _ in placed]),
        sha256=content_hash(listing),
        listing=listing,
        sources=[file_source(path, split, spec.text_field) for path, split in placed],
        facts={},
    )


def _directory_names(paths: list[Path]) -> str:
    """What to call a corpus of files: the names of the directories they lie in, not where those are."""
    first, *more = sorted({path.parent.name or "files" for path in paths})
    return "+".join([first, *more] if len(more) < 3 else [first, f"{len(more)}_more"])


def matches(field: str, patterns: str) -> list[Path]:
    """The files that comma separated glob patterns match, in the patterns' order, each once."""
    found: dict[Path, None] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        hits = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        files = [Path(os.path.abspath(hit)) for hit in hits if os.path.isfile(hit)]
        if not files:
            raise InputError(
                f"{field}: {pattern!r} matches no file; use glob patterns of text files, comma separated."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def file_hash(path: Path) -> str:
    """sha256 of the stored bytes, in hex."""
    try:
        with open(path, "rb") as stored:
            return hashlib.file_digest(stored, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use a readable file.") from error


def file_source(path: Path, split: str, text_field: str) -> Source:
    """The documents of one text or JSONL file."""

    def read(on_stored: OnStored) -> Iterator[Segment]:
        texts = decoded(read_chunks(path, on_stored), path)
        is_json = plain_name(path).endswith(".jsonl")
        return segments(json_documents(texts, text_field, path) if is_json else documents(texts))

    return Source(split, path.stat().st_size, read)
