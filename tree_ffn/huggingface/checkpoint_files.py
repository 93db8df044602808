"""The files of a Hugging Face checkpoint: config.json, and safetensors in one piece or in several.

Only safetensors is ever opened. Pickles (`pytorch_model.bin`) can run code when they are loaded: they are
refused by name and never read.
"""

import os
from typing import NamedTuple

import numpy as np

from tree_ffn.errors import InputError, check_not_pointer, reason
from tree_ffn.json_input import parse_object
from tree_ffn.models.safetensors_file import Entry, read_header, read_metadata

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_JSON = 16 * 2**20


class Files(NamedTuple):
    """A checkpoint whose headers were read and checked; no tensor was.

    Attributes:
      directory: where it stands.
      config: the values of config.json.
      entries: what the headers say of every tensor.
      paths: the file of every tensor.
      aliases: {name: name of the same tensor}, for names that share a tensor which was written once.
    """

    directory: str
    config: dict
    entries: dict[str, Entry]
    paths: dict[str, str]
    aliases: dict[str, str]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or some of its rows, copied out of its file.

        The file is opened for this one tensor: its pages leave memory with it.

        Raises:
          InputError: the file changed since its header was checked.
        """
        from safetensors import SafetensorError, safe_open

        path = self.paths[name]
        try:
            with safe_open(path, framework="numpy") as file:
                tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"pretrained: {path!r} cannot be read as safetensors: {reason(error)}."
            ) from None
        if rows is None and tensor.shape != self.entries[name].shape:
            raise InputError(f"pretrained: {path!r} changed while it was read; start again.")
        return tensor


def open_files(directory: str) -> Files:
    """The checkpoint in a directory: model.safetensors, or what model.safetensors.index.json names.

    Raises:
      InputError: there is none, only pickles, or a file is damaged.

    Example:
      >>> open_files("tests/huggingface/fixtures/opt_sharded").config["model_type"]
      'opt'
    """
    if os.path.isfile(directory) and directory.endswith(PICKLES):
        _refuse_pickle(directory)
    if not os.path.isdir(directory):
        raise InputError(
            f"pretrained: {directory!r} is not a directory; name one with {CONFIG} and {WEIGHTS}."
        )
    names = sorted(os.listdir(directory))
    if WEIGHTS in names:
        entries = read_header(os.path.join(directory, WEIGHTS))
        paths = dict.fromkeys(entries, os.path.join(directory, WEIGHTS))
    elif INDEX in names:
        entries, paths = _open_shards(directory)
    else:
        for name in names:
            if name.endswith(PICKLES):
                _refuse_pickle(os.path.join(directory, name))
        raise InputError(
            f"pretrained: {directory!r} has neither {WEIGHTS} nor {INDEX}; one of them is needed."
        )
    return Files(
        directory, read_json(os.path.join(directory, CONFIG)), entries, paths, _aliases(entries, paths)
    )


def _aliases(entries: dict[str, Entry], paths: dict[str, str]) -> dict[str, str]:
    """What the files' metadata say of tensors that had several names.

    `safetensors.torch.save_model`, also accelerate's, writes such a tensor once and {left out: written}.
    """
    aliases = {}
    for path in sorted(set(paths.values())):
        for one, other in read_metadata(path).items():
            for left_out, written in ((one, other), (other, one)):
                if written in entries and left_out not in entries:
                    aliases[left_out] = written
    return aliases


def _refuse_pickle(path: str):
    if os.path.isfile(path):
        with open(path, "rb") as file:
            check_not_pointer(f"pretrained: {path!r}", file.read(40))
    raise InputError(
        f"pretrained: {path!r} is a pickle, which can run code when it is loaded; convert it to safetensors "
        f"({WEIGHTS})."
    )


def _open_shards(directory: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and paths of all shards; index and headers must name the same tensors."""
    index = os.path.join(directory, INDEX)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(_is_shard_name(name) for name in where.values()):
        raise InputError(
            f"pretrained: weight_map in {index!r} is not allowed; it maps names of tensors to "
            ".safetensors files of the same directory."
        )
    entries: dict[str, Entry] = {}
    paths: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        path = os.path.join(directory, shard)
        found = read_header(path)
        listed = {name for name, file in where.items() if file == shard}
        if odd := sorted(found.keys() ^ listed):
            raise InputError(
                f"pretrained: {index!r} and {path!r} do not agree about {said(odd)}; get both files again."
            )
        entries |= found
        paths |= dict.fromkeys(found, path)
    return entries, paths


def _is_shard_name(name) -> bool:
    # No way out of the directory.
    return isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name


def read_json(path: str) -> dict:
    """The object in a JSON file of bounded size.

    Raises:
      InputError: there is none.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(min(os.path.getsize(path), MAX_JSON) + 1)
    except OSError as error:
        raise InputError(f"pretrained: {path!r} cannot be read: {error.strerror}.") from None
    if len(text) > MAX_JSON:
        raise InputError(f"pretrained: {path!r} is larger than the {MAX_JSON // 2**20} MiB that are read.")
    return parse_object(text, f"pretrained: {path!r}")


def said(names: list[str], most: int = 8) -> str:
    """Names as a part of a sentence, cut where they are many.

    Example:
      >>> said(["a", "b", "c"], most=2)
      'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:100] if name.isprintable() else ascii(name[:100]) for name in names[:most]) + more
