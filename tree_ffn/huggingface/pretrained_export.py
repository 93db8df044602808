"""Our parameters as a Hugging Face checkpoint, one tensor at a time (see `pretrained.py`)."""

import math
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.huggingface.checkpoint_files import CONFIG, INDEX, WEIGHTS
from tree_ffn.huggingface.families import FAMILIES, HEAD, Place, full_name, places
from tree_ffn.huggingface.family_config import config_from_spec
from tree_ffn.huggingface.pretrained_import import skipped_rows, view_of
from tree_ffn.json_output import json_text
from tree_ffn.models.safetensors_file import FLOATS, write
from tree_ffn.models.spec import ModelSpec

DTYPES = tuple(FLOATS.values())


def save(
    directory: str,
    spec: ModelSpec,
    variables: dict,
    origin: dict | None = None,
    *,
    family: str = "gpt2",
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model as config.json and safetensors that transformers loads.

    What `load` read is written back bit for bit: same names (but for wrappers'
    parts), same values, same dtype, and the same config.json.

    Args:
      directory: where the files go; made if it is not there.
      spec: the model: dense layers of one width, GELU or ReLU.
      variables: {"params": ...}.
      origin: of `Pretrained`, for a model that was imported; it decides the family.
      family: `gpt2` or `opt`, for any other model.
      dtype: of the tensors, values are rounded to it; None: that of the files
        the model came from, if every value is still one of it, or that of the
        weights of any other model.
      shard_bytes: more than this goes into several files.

    Raises:
      InputError: the format has no word for the model, the directory holds a
        model already, or a value does not fit the dtype.
    """
    if origin is not None and not isinstance(origin.get("config"), dict):
        raise InputError("origin: it lacks the config of the checkpoint; import the checkpoint again.")
    family = family if origin is None else str(origin.get("family"))
    check_choice("family", family, tuple(FAMILIES))
    check_positive_int("shard_bytes", shard_bytes)
    exact = dtype is None and origin is not None
    dtype = dtype or (origin or {}).get("dtype") or spec.param_dtype
    check_choice("dtype", dtype, DTYPES)
    # Rows that pad our own tables were never trained; transformers would score them.
    rows = spec.vocab_rows if origin else spec.vocab_size
    config = config_from_spec(family, spec, rows, dtype, (origin or {}).get("config"))
    # A view of every leaf, also of a jax.Array on a CPU.
    params = jax.tree.map(np.asarray, variables["params"])
    prefix = str((origin or {}).get("prefix", FAMILIES[family].prefixes[0]))
    wanted = {
        full_name(prefix, name): value
        for name, value in places(FAMILIES[family], spec, spec.max_seq_len, rows).items()
    }
    if (origin or {}).get("head") and spec.tied_head:
        wanted[HEAD] = next(iter(wanted.values()))

    def tensor(name: str) -> np.ndarray:
        place, layer = wanted[name]
        value = view_of(params, spec, place, layer)
        if place.leaf in ("embed/tokens", "embed/head"):
            value = value[:rows]
        if place.skip:
            value = np.concatenate([skipped_rows(origin or {}, place.skip, spec.width, value.dtype), value])
        return _cast(name, value, dtype, exact)

    _write(
        directory, config, {name: place for name, (place, _) in wanted.items()}, tensor, dtype, shard_bytes
    )


def _cast(name: str, value: np.ndarray, dtype: str, exact: bool) -> np.ndarray:
    """The values in `dtype`, C order; InputError where they do not fit."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value.astype(dtype, copy=False))
    if value.dtype == cast.dtype:
        return cast
    if np.isinf(cast).any() and not np.isinf(value).any():
        raise InputError(f"dtype: {name} has values beyond the range of {dtype}; use float32.")
    if exact and not np.array_equal(cast.astype(value.dtype), value, equal_nan=True):
        raise InputError(
            f"dtype: {name} has values that {dtype}, the dtype of the checkpoint it came from, cannot hold; "
            f"name float32 to keep them, or {dtype} to round them."
        )
    return cast


def _write(directory: str, config: dict, shapes: dict[str, Place], tensor, dtype: str, shard_bytes: int):
    """All files, each complete before any takes its place."""
    shards = _shards(shapes, jnp.dtype(dtype).itemsize, shard_bytes)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    try:
        os.makedirs(directory, exist_ok=True)
        if there := [
            name for name in os.listdir(directory) if name.endswith((CONFIG, ".safetensors", INDEX))
        ]:
            raise InputError(
                f"export: {directory!r} holds {sorted(there)[0]} already; name another directory."
            )
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as new:
            for name, shard in zip(names, shards):
                ours = {key: (dtype, shapes[key].shape) for key in shard}
                # The package's own word, which transformers asks for.
                write(os.path.join(new, name), ours, tensor, {"format": "pt"})
            if count > 1:
                where = {key: name for name, shard in zip(names, shards) for key in shard}
                total = sum(math.prod(place.shape) for place in shapes.values()) * jnp.dtype(dtype).itemsize
                _write_json(
                    os.path.join(new, INDEX), {"metadata": {"total_size": total}, "weight_map": where}
                )
                names.append(INDEX)
            _write_json(os.path.join(new, CONFIG), config)
            for name in (*names, CONFIG):
                os.replace(os.path.join(new, name), os.path.join(directory, name))
    except OSError as error:
        raise InputError(f"export: {directory!r} cannot be written: {error.strerror or error}.") from None


def _shards(shapes: dict[str, Place], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Names in order, cut before a shard would grow over `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, place in shapes.items():
        size = math.prod(place.shape) * item_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: str, values: dict):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json_text(values, path, indent=2) + "\n")
