"""A model as two files that need no JAX to read: model.safetensors and config.json.

model.safetensors   every leaf of the variables by its path, "params/run_0/attn/w_qkv", as stored
config.json         {"format": "tree_ffn", "version": 1, "model": ModelSpec, "tokenizer": name, "meta": ...}
"""

import os
import tempfile

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from tree_ffn.errors import InputError, reason
from tree_ffn.json_input import parse_object
from tree_ffn.json_output import json_text
from tree_ffn.models.cost import abstract_variables
from tree_ffn.models.finite import check_finite
from tree_ffn.models.safetensors_file import read_header
from tree_ffn.models.spec import ModelSpec, spec_from_dict, spec_to_dict
from tree_ffn.models.unread import check_unmoved, unread

FORMAT, VERSION = "tree_ffn", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(
    directory: str, spec: ModelSpec, variables: dict, tokenizer: str = "bytes", meta: dict | None = None
) -> None:
    """Writes a model; an export of this library that stands there is replaced.

    Args:
      directory: where the two files go; made if it is not there.
      spec: the model.
      variables: {"params": ..., "routing": ...}.
      tokenizer: what `data.tokenizer` says: kept, not read.
      meta: more JSON values to keep.

    Raises:
      InputError: the directory holds other files of these names, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors = {path: np.asarray(leaf) for path, leaf in _by_path(variables).items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": spec_to_dict(spec),
        "tokenizer": tokenizer,
        "meta": meta or {},
    }
    if any(os.path.exists(os.path.join(directory, name)) for name in (WEIGHTS, CONFIG)):
        read_config(directory)  # raises unless it is an export of ours
    try:
        os.makedirs(directory, exist_ok=True)
        # Both files are complete before either takes its place.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as new:
            save_file(tensors, os.path.join(new, WEIGHTS), metadata={"format": FORMAT})
            with open(os.path.join(new, CONFIG), "w", encoding="utf-8") as file:
                file.write(json_text(config, CONFIG, indent=2))
            os.chmod(
                os.path.join(new, WEIGHTS), os.stat(os.path.join(new, CONFIG)).st_mode
            )  # safetensors: 0600
            for name in (WEIGHTS, CONFIG):
                os.replace(os.path.join(new, name), os.path.join(directory, name))
    except (OSError, SafetensorError) as error:  # the latter of a full disk
        raise InputError(f"export: {directory!r} cannot be written: {reason(error)}.") from None


def load(directory: str) -> tuple[ModelSpec, dict, dict]:
    """Reads what `save` wrote, bit for bit.

    Returns:
      the spec, the variables as NumPy arrays, and the whole of config.json.

    Raises:
      InputError: a file is missing, damaged, or not of this library, or a weight is no finite number.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = read_config(directory)
    spec = spec_from_dict(config.get("model", {}))
    path = os.path.join(directory, WEIGHTS)
    if not os.path.exists(path):
        raise InputError(f"export: {path!r} is not there; the export is not complete.")
    read_header(path, "export")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, AttributeError, ValueError) as error:  # the latter: not for NumPy
        raise InputError(f"export: {path!r} cannot be read as safetensors: {reason(error)}.") from None
    expected = _by_path(abstract_variables(spec))
    biases = unread(tensors, expected)
    check_unmoved(biases, path, "export")
    tensors = {name: value for name, value in tensors.items() if name not in biases}
    _check_tensors(path, tensors, expected)
    check_finite(tensors.items(), path, "export")
    return spec, unflatten_dict(tensors, sep="/"), config


def _by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def read_config(directory: str) -> dict:
    """The config.json of an exported model: format, version, model, tokenizer, meta.

    Raises:
      InputError: it cannot be read, or is of another format or version.
    """
    path = os.path.join(directory, CONFIG)
    try:
        with open(path, "rb") as file:
            config = parse_object(file.read(), f"export: {path!r}", finite=False)
    except OSError as error:
        raise InputError(f"export: {path!r} cannot be read: {error.strerror}.") from None
    if config.get("format") != FORMAT:
        raise InputError(
            f"export: {path!r} is not a model of {FORMAT}; use the directory of an exported model."
        )
    if config.get("version") != VERSION:
        raise InputError(
            f"export: {path!r} has version {config.get('version')!r}; this library reads {VERSION}."
        )
    return config


def _check_tensors(path, tensors, expected):
    """Raises InputError naming the first tensor that config.json does not explain."""
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors:
            raise InputError(f"export: {path!r} lacks {name}, which its config.json asks for.")
        if name not in expected:
            raise InputError(f"export: {path!r} holds {name}, which its config.json does not know.")
        have, want = tensors[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise InputError(
                f"export: {name} in {path!r} is {have.dtype}{list(have.shape)}; "
                f"its config.json asks for {want.dtype}{list(want.shape)}."
            )
