"""Paths as people write them, of every flag and config: `~` is found, another machine's are refused."""

import os
import re

from tree_ffn.errors import InputError

_HERE = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


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


def local_each(paths: str, field: str) -> str:
    """`local` of paths or glob patterns that are joined by commas.

    Example:
      >>> local_each("file:///a/vocab.json,merges.txt", "data.tokenizer")
      '/a/vocab.json,merges.txt'
    """
    return ",".join(local(part.strip(), field) for part in paths.split(","))
