"""The texts a corpus is made from: found, named by their hashes, ready to read."""

import contextlib
import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tree_ffn.data.compressed import read_bytes, read_chunks
from tree_ffn.data.documents import Segment, documents, key_of, segments
from tree_ffn.data.formats import TEXT, OnStored, decoded, kind_of, read_rows, text_under
from tree_ffn.data.spec import CorpusSpec
from tree_ffn.errors import InputError
from tree_ffn.paths import expanded, local, split_at_commas

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
      notes: lines on files that hold the same as others.
    """

    name: str
    sha256: str
    listing: list[tuple[str, str, str]]
    sources: list[Source]
    facts: dict
    notes: tuple[str, ...] = ()


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
    texts = named_texts(spec)
    split = "train" if texts.valid else ""
    placed = [(path, split) for path in texts.train] + [(path, "valid") for path in texts.valid]
    listing = [(path.name, texts.hashes[path], split) for path, split in placed]
    return Inputs(
        name=_directory_names([path for path, _ in placed]),
        sha256=content_hash(listing),
        listing=listing,
        sources=[file_source(path, split, spec.text_field) for path, split in placed],
        facts={},
        notes=texts.notes,
    )


class Texts(NamedTuple):
    """The files of a corpus: none that is held out is trained on.

    Attributes:
      train: those to train on, and to hold documents out of where `valid` is empty.
      valid: those held out.
      hashes: sha256 of each.
      notes: lines on files that hold the same as others.
    """

    train: list[Path]
    valid: list[Path]
    hashes: dict[Path, str]
    notes: tuple[str, ...]


def named_texts(spec: CorpusSpec) -> Texts:
    """The files that `files` and `valid_files` match, told apart by what they are and not by their names.

    A file that is held out is not trained on, whether it is named by a link there or is a copy, packed or
    not. Copies within the text to train on are read, for some weigh texts so, and said.

    Raises:
      InputError: nothing is left to train on.
    """
    valid = matches("data.valid_files", spec.valid_files) if spec.valid_files else []
    held_out = set(map(_identity, valid))
    train = [path for path in matches("data.files", spec.files) if _identity(path) not in held_out]
    hashes = {path: file_hash(path) for path in [*train, *valid]}
    copies, first, notes = same_text(train, valid), {}, []
    for path in filter(_has_text, train):
        if same := copies.get(path):
            notes.append(f"{path} is not trained on: it holds the same as {same}, which is held out")
        elif (same := first.setdefault(hashes[path], path)) != path:
            notes.append(f"{path} is read as well as {same}, which holds the same")
    train = [path for path in train if path not in copies]
    if not train:
        raise InputError(
            f"data.files: {spec.files!r} matches nothing that data.valid_files leaves; name more."
        )
    return Texts(train, valid, hashes, tuple(notes))


def same_text(paths: list[Path], others: list[Path]) -> dict[Path, Path]:
    """{one of `paths`: one of `others` with the same text}, whatever packs each; not of empty ones."""
    known: dict[bytes, list[Path]] = {}
    for other in others:
        known.setdefault(_beginning(other), []).append(other)
    whole = functools.cache(_unpacked_hash)
    known.pop(b"", None)
    return {
        path: same[0]
        for path in (paths if known else ())
        if (same := [other for other in known.get(_beginning(path), ()) if whole(other) == whole(path)])
    }


def _beginning(path: Path) -> bytes:
    """A hash of up to 64 KiB of a file's text: enough to tell most apart, and soon unpacked; of none b""."""
    found = b""
    with contextlib.closing(read_chunks(path)) as chunks:
        while len(found) < 1 << 16 and (chunk := next(chunks, b"")):
            found += chunk
    return hashlib.sha256(found[: 1 << 16]).digest() if found else b""


def _unpacked_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _has_text(path: Path) -> bool:
    """Whether a file is not empty; those that are have all the same content."""
    return path.stat().st_size > 0


def _identity(path: Path) -> tuple[int, int]:
    """Which file it is: links to it, and other spellings of its path, have the same."""
    found = path.stat()
    return found.st_dev, found.st_ino


def trained_on(spec: CorpusSpec, files: str) -> list[Path]:
    """Those of some files that `spec` trains on, whatever they are called there.

    Args:
      spec: of a run; where its files cannot be read any more, nothing is known of them.
      files: glob patterns, comma separated.
    """
    if spec.corpus != "files":
        return []
    asked = matches("data.files", files)
    try:
        valid = matches("data.valid_files", spec.valid_files) if spec.valid_files else []
        trained, held_out = same_text(asked, matches("data.files", spec.files)), same_text(asked, valid)
    except InputError:
        return []
    return [path for path in asked if path in trained and path not in held_out]


def _directory_names(paths: list[Path]) -> str:
    """What to call a corpus of files: the names of the directories they lie in, not where those are."""
    first, *more = sorted({path.parent.name or "files" for path in paths})
    return "+".join([first, *more] if len(more) < 3 else [first, f"{len(more)}_more"])


def matches(field: str, patterns: str) -> list[Path]:
    """The files that comma separated glob patterns match, in the patterns' order; links to one are one.

    Raises:
      InputError: a pattern matches no file, or one whose name says that it is no text.
    """
    found: dict[tuple[int, int], Path] = {}
    for part in split_at_commas(patterns):
        hits = expanded(local(part, field))
        files = [Path(os.path.abspath(hit)) for hit in hits if os.path.isfile(hit)]
        if not files:
            raise InputError(
                f"{field}: {part!r} matches no file; use glob patterns of text files, comma separated."
            )
        for path in files:
            kind_of(path, f"{field}: {path}")
            found.setdefault(_identity(path), path)
    return list(found.values())


def file_hash(path: Path) -> str:
    """sha256 of the stored bytes, in hex."""
    try:
        with open(path, "rb") as stored:
            return hashlib.file_digest(stored, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use a readable file.") from error


def file_source(path: Path, split: str, text_field: str) -> Source:
    """The documents of one file.

    Args:
      path: of the file.
      split: `train`, `valid`, or '' where each document's key decides.
      text_field: of JSON and parquet: the field that holds the text.
    """
    read = lambda on_stored: segments(file_documents(path, text_field, on_stored))
    return Source(split, path.stat().st_size, read)


def file_documents(path: Path, text_field: str, on_stored: OnStored) -> Iterator[tuple[str, bool]]:
    """The documents of one file, as `documents.documents` yields them.

    Args:
      path: of the file.
      text_field: of JSON and parquet: the field that holds the text.
      on_stored: called with the position reached in the stored file.

    Raises:
      InputError: it cannot be read, or a row of JSON or parquet has no text; names the file and the row.
    """
    if kind_of(path) == TEXT:
        yield from documents(decoded(read_chunks(path, on_stored), path))
        return
    for place, row in read_rows(path, str(path), [text_field], on_stored):
        text = text_under(place, row, text_field)
        if text is None:
            raise InputError(
                f"{place}: no text under {text_field!r}; data.text_field names the field that holds it."
            )
        yield from documents([text])
