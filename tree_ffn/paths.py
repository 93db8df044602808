"""Paths as people write them, of every flag and config; and writes that say why they fail.

`~` is found, another machine's are refused, and what is there comes before what `[`, `*`, `?` and
commas mean.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tree_ffn.errors import InputError, reason

_HERE = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# No file system knows a longer one.
_LONGEST_NAME = 255


def local(path: str, field: str) -> str:
    """The path on this machine that `path` names: `~` and `~user` expanded, `file://` dropped.

    Variables such as $HOME are a shell's to expand. What is not a place in a file system of this machine
    (gs://, s3://, hdfs://, memory://, https://, ...) is refused, where it would make a directory `gs:`.

    Args:
      path: a path or a glob pattern.
      field: the flag or config value it comes from, for errors.

    Raises:
      InputError: it is on no file system of this machine, or the user of `~user` is not known.

    Example:
      >>> local("file:///data/text.txt", "data.files"), local("runs/tree", "workdir")
      ('/data/text.txt', 'runs/tree')
    """
    if _HERE.match(path):
        return _HERE.sub("", path, count=1)
    if _ELSEWHERE.match(path):
        raise InputError(
            f"{field}: {path!r} is not on this machine; mount it, or copy it here, and name a local path."
        )
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        raise InputError(f"{field}: {path!r} names no user of this machine; ./{path} is a path of that name.")
    return found


def local_or_bucket(path: str, field: str) -> str:
    """`local`, but that a place in a bucket, gs://BUCKET/PATH, is itself.

    Example:
      >>> local_or_bucket("gs://runs/tree/", "workdir"), local_or_bucket("runs/tree", "workdir")
      ('gs://runs/tree', 'runs/tree')
    """
    if re.match(r"gs://[^/]+/.*[^/]", path):
        return path.rstrip("/")
    return local(path, field)


def local_each(paths: str, field: str) -> str:
    """`local` of paths or glob patterns that are joined by commas.

    Example:
      >>> local_each("file:///a/vocab.json,merges.txt", "data.tokenizer")
      '/a/vocab.json,merges.txt'
    """
    return ",".join(local(part, field) for part in split_at_commas(paths))


def expanded(pattern: str) -> list[str]:
    """The paths that a glob pattern matches, sorted; `**` descends, through links too, once into a directory.

    A path that is there is itself, and so are the directories with which a pattern begins, whatever signs
    are in their names.

    Example:
      >>> expanded("tree_ffn/err*.py"), expanded("none*")
      (['tree_ffn/errors.py'], [])
    """
    if os.path.lexists(pattern):
        return [pattern]
    parts = Path(pattern).parts
    n = next(n for n in range(len(parts), -1, -1) if n == 0 or os.path.isdir(os.path.join(*parts[:n])))
    parts = [*map(glob.escape, parts[:n]), *parts[n:]]
    return sorted(_matches(parts)) if parts else []


def _matches(parts: list[str]) -> list[str]:
    """glob.glob of the parts of a pattern; links in a circle, which that follows 40 deep, end here."""
    if "**" not in parts:
        return glob.glob(os.path.join(*parts))
    n, seen, found = parts.index("**"), set(), []
    for top in _matches(parts[:n]) if n else ["."]:
        for directory, below, _ in os.walk(top, followlinks=True):
            there = os.stat(directory)
            if (there.st_dev, there.st_ino) in seen:
                below.clear()
                continue
            seen.add((there.st_dev, there.st_ino))
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = [glob.escape(directory).removeprefix("./")] if n or directory != "." else []
            found += _matches([*inside, *(parts[n + 1 :] or ["*"])])
    return found


def split_at_commas(text: str) -> list[str]:
    """The parts of a comma separated list of paths and patterns; empty ones are left out.

    A file that is there may have commas in its name, and so may the directory with which a pattern begins.

    Example:
      >>> split_at_commas("a.txt,, *.txt")
      ['a.txt', '*.txt']
    """
    rest, found = text.split(","), []
    while rest:
        n = _n_parts(rest)
        found.append(",".join(rest[:n]).strip())
        rest = rest[n:]
    return [part for part in found if part]


def _n_parts(parts: list[str]) -> int:
    """How many of the first parts are one path that is there, as many as possible; else 1."""
    longest, whole = 1, os.path.expanduser(_HERE.sub("", parts[0].lstrip(), count=1))
    for n, part in enumerate(parts[1:], start=2):
        name, slash, _ = part.partition("/")
        # A pattern below a directory with commas is there as the directory is.
        is_below = bool(slash) and os.path.isdir(f"{whole},{name}")
        whole = f"{whole},{part}"
        if slash and not is_below or len(os.path.basename(whole)) > _LONGEST_NAME:
            break
        if is_below or os.path.isfile(whole.rstrip()):
            longest = n
    return longest


@contextlib.contextmanager
def writing(path: str, field: str = "workdir") -> Iterator[None]:
    """Says in one sentence what the operating system says about `path`, which `field` led to.

    Raises:
      InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{field}: {path} cannot be written ({reason(error)}).") from error


@contextlib.contextmanager
def replacing(path: str, mode: str = "w", field: str = "workdir") -> Iterator[IO]:
    """A file that takes the place of `path` once all of it is written; after an error `path` is as it was.

    Args:
      path: of the file; it need not be there.
      mode: "w" for text in UTF-8, "wb" for bytes.
      field: what led to the path; an error names it.

    Raises:
      InputError: it cannot be written.

    Example:
      >>> with replacing("runs/tree/config.json") as file:      # doctest: +SKIP
      ...     file.write("{}")
    """
    with writing(path, field):
        with open(path + ".new", mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(path + ".new", path)
