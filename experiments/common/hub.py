"""Checkpoints by their name on the Hugging Face hub: safetensors, JSON and tokenizer files, nothing else."""

import os
import re

from tree_ffn.errors import InputError, reason

FETCHED = ("*.safetensors", "*.json", "merges.txt", "chat_template.jinja")


def directory_of(name: str, revision: str | None = None) -> str:
    """The directory of a checkpoint, fetched first if `name` is a hub's name.

    Args:
      name: a directory, or owner/model (one name for the oldest models).
      revision: branch, tag or commit on the hub; None: main.

    Raises:
      InputError: it is neither, the package huggingface_hub is missing, or the
        hub cannot be reached.
    """
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return name
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"--from: {name!r} is no directory, and to fetch it from the Hugging Face hub needs the package "
            "huggingface_hub (pip install 'tree_ffn[train]' brings it); install it or name a "
            "directory."
        ) from None
    try:
        return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FETCHED))
    except Exception as error:  # of the package, of its HTTP library, of the file system
        raise InputError(
            f"--from: {name!r} is no directory, and the Hugging Face hub does not give it ({reason(error)}); "
            "name a directory, or try again with a network."
        ) from None
