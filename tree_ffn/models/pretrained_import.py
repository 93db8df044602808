"""A Hugging Face checkpoint into our parameters, one tensor at a time (see `pretrained.py`)."""

import base64
import binascii
import dataclasses
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_choice
from tree_ffn.models.checkpoint_files import CONFIG, Files, open_files, said
from tree_ffn.models.describe import abstract_variables
from tree_ffn.models.families import FAMILIES, Family, Place, places
from tree_ffn.models.family_config import family_of, spec_from_config
from tree_ffn.models.safetensors_file import FLOATS
from tree_ffn.models.spec import ModelSpec

HEAD = "lm_head.weight"
# GPT-2's causal mask and the value it masks with: constants that old files hold.
MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
STORED = ("float32", "bfloat16", "float16", "keep")


class Pretrained(NamedTuple):
    """A model that was made elsewhere.

    Attributes:
      spec: what it is.
      variables: {"params": ...}, NumPy arrays.
      origin: JSON values with which `save` writes it back:
        family, config (their config.json), prefix, head (whether the token
        table was stored a second time as the head), dtype, and skipped (rows
        before position 0, in base64).
    """

    spec: ModelSpec
    variables: dict
    origin: dict


def load(
    directory: str, *, param_dtype: str = "float32", context: int | None = None, vocab_size: int | None = None
) -> Pretrained:
    """Reads a checkpoint.

    Args:
      directory: with config.json and safetensors.
      param_dtype: of the stored weights: `float32`, `bfloat16`, `float16`, or
        `keep` for that of the files.
      context: positions to keep, at most those of the checkpoint; None: all.
      vocab_size: ids that are scored, at most the rows of the token table;
        None: all rows, as transformers does. Tables are often padded (OPT:
        50,272 rows, 50,265 tokens), and a tokenizer's own count leaves out ids
        that no text has. The rows stay, the scores of the others do not change.

    Raises:
      InputError: the checkpoint is damaged, incomplete, of another structure,
        or an argument does not fit it.

    Example:
      >>> model = load("tests/models/fixtures/gpt2_gelu_new")
      >>> model.spec.ffns[0].activation, model.variables["params"]["run_0"]["attn"]["w_qkv"].shape
      ('gelu_tanh', (2, 16, 3, 2, 8))
    """
    check_choice("param_dtype", param_dtype, STORED)
    files = open_files(directory)
    path = os.path.join(directory, CONFIG)
    family = family_of(files.config, path)
    full = spec_from_config(files.config, path, len(files.entries))
    wanted = places(family, full, full.context, full.vocab_size)
    prefix = _check_tensors(family, files, wanted)
    dtypes = sorted({FLOATS[files.entries[prefix + name].dtype] for name in wanted})
    if param_dtype == "keep" and len(dtypes) > 1:
        raise InputError(
            f"param_dtype: 'keep' is not possible for {directory!r}, which holds {' and '.join(dtypes)}; "
            "name one dtype."
        )
    spec = _asked(full, dtypes[0] if param_dtype == "keep" else param_dtype, context, vocab_size)
    # Memory is asked for here, and used as it is written to.
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_variables(spec)["params"])
    origin = {
        "family": files.config["model_type"],
        "config": files.config,
        "prefix": prefix,
        "head": HEAD in files.entries,
        "dtype": dtypes[0] if len(dtypes) == 1 else "float32",
    }
    origin["skipped"] = _fill(params, spec, files, wanted, origin)
    if origin["head"]:
        _check_head(files, params["embed"]["tokens"])
    return Pretrained(spec, {"params": params}, origin)


def _asked(full: ModelSpec, param_dtype: str, context: int | None, vocab_size: int | None) -> ModelSpec:
    """The spec with the dtype, context and vocabulary asked for."""
    context = full.context if context is None else context
    if context > full.context:
        raise InputError(f"context: {context} is not allowed; the checkpoint has {full.context} positions.")
    rows = full.vocab_size
    vocab_size = rows if vocab_size is None else vocab_size
    if vocab_size > rows:
        raise InputError(
            f"vocab_size: {vocab_size} is not allowed; the checkpoint has {rows} rows of tokens."
        )
    multiples = [2**i for i in range(rows.bit_length()) if -(-vocab_size // 2**i) * 2**i == rows]
    multiple = multiples[0] if multiples else rows
    return dataclasses.replace(
        full, context=context, vocab_size=vocab_size, vocab_multiple=multiple, param_dtype=param_dtype
    )


def _check_tensors(family: Family, files: Files, wanted: dict) -> str:
    """The prefix of the names; InputError lists all tensors that are missing, extra or of another shape."""
    anchor = next(iter(wanted))
    prefix = next((p for p in family.prefixes if p + anchor in files.entries), family.prefixes[0])
    shapes = {prefix + name: place.shape for name, (place, _) in wanted.items()}
    tokens_shape = shapes[prefix + anchor]
    masks = {name for name in files.entries if family is FAMILIES["gpt2"] and MASKS.fullmatch(name)}
    missing = [name for name in shapes if name not in files.entries]
    extra = sorted(files.entries.keys() - shapes.keys() - masks - {HEAD})
    known = shapes | ({HEAD: tokens_shape} if HEAD in files.entries else {})
    misshapen, unusable = [], []
    for name in known.keys() & files.entries.keys():
        entry = files.entries[name]
        if entry.shape != known[name]:
            misshapen.append(f"{name} {list(entry.shape)} for {list(known[name])}")
        if entry.dtype not in FLOATS:
            unusable.append(f"{name} {entry.dtype}")
    lists = (
        ("missing", missing),
        ("not known", extra),
        ("of another shape", misshapen),
        ("no floats", unusable),
    )
    if wrong := [f"{what}: {said(sorted(names))}" for what, names in lists if names]:
        raise InputError(
            f"pretrained: the tensors in {files.directory!r} are not those of its {CONFIG}; "
            f"{'; '.join(wrong)}."
        )
    return prefix


def _fill(params: dict, spec: ModelSpec, files: Files, wanted: dict, origin: dict) -> str | None:
    """Copies every tensor into its place; returns the skipped rows in base64."""
    skipped, prefix = None, origin["prefix"]
    for name, (place, layer) in wanted.items():
        tensor = files.read(prefix + name)
        view = view_of(params, spec, place, layer)
        try:
            with np.errstate(over="raise"):
                view[...] = tensor[place.skip : place.skip + len(view)]
        except FloatingPointError:
            raise InputError(
                f"param_dtype: {prefix + name} has values beyond the range of {spec.param_dtype}; use "
                "float32."
            ) from None
        if place.skip:
            skipped = base64.b64encode(tensor[: place.skip].astype(origin["dtype"]).tobytes()).decode("ascii")
    return skipped


def view_of(params: dict, spec: ModelSpec, place: Place, layer: int | None) -> np.ndarray:
    """Our values of one of their tensors, laid out as theirs: writing to them writes the parameters."""
    if layer is not None:
        for i, (_, length) in enumerate(spec.runs):
            if layer < length:
                params = params[f"run_{i}"]
                break
            layer -= length
    leaf = params
    for part in place.leaf.split("/"):
        leaf = leaf[part]
    view = place.view(leaf if layer is None else leaf[layer])
    assert np.shares_memory(view, leaf), place
    return view


def _check_head(files: Files, table_VE: np.ndarray):
    head = files.read(HEAD)
    for i in range(0, len(head), 4096):  # in parts: no second copy of the largest tensor
        part = table_VE[i : i + 4096]
        if not np.array_equal(head[i : i + 4096].astype(part.dtype), part):
            raise InputError(
                f"pretrained: {HEAD} in {files.directory!r} differs from the token embeddings; a "
                "model here has one table for both."
            )


def skipped_rows(origin: dict, n_rows: int, width: int, dtype) -> np.ndarray:
    """The rows before position 0 that a checkpoint came with; zeros for a model that came with none."""
    text, stored = origin.get("skipped"), jnp.dtype(origin.get("dtype", "float32"))
    if text is None:
        return np.zeros((n_rows, width), dtype)
    try:
        rows = np.frombuffer(base64.b64decode(text, validate=True), stored).reshape(n_rows, width)
    except (binascii.Error, ValueError, TypeError):
        raise InputError(
            f"pretrained: the {n_rows} rows before position 0 in the export's config.json are damaged; "
            "import the checkpoint again."
        ) from None
    return rows.astype(dtype)
