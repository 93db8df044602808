"""A Hugging Face checkpoint into our parameters, one tensor at a time (see `pretrained.py`)."""

import base64
import binascii
import collections
import dataclasses
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError, check_choice
from tree_ffn.huggingface.checkpoint_files import CONFIG, Files, open_files, said
from tree_ffn.huggingface.families import FAMILIES, HEAD, Family, Place, full_name, places, split_name
from tree_ffn.huggingface.family_config import TIED, family_of, spec_from_config
from tree_ffn.models.cost import abstract_variables
from tree_ffn.models.finite import all_finite, check_finite
from tree_ffn.models.safetensors_file import READ_FLOATS
from tree_ffn.models.spec import ModelSpec

# GPT-2's causal mask and the value it masks with: constants that old files hold.
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# How packages that pack weights into few bits store them, and name what they add.
PACKED = re.compile(r".*\.(qweight|qzeros|SCB|absmax|quant_map|weight_packed|weight_scale)")
PACKED_DTYPES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
STORED = ("float32", "bfloat16", "float16", "keep")


class Pretrained(NamedTuple):
    """A model that was made elsewhere.

    Attributes:
      spec: what it is.
      variables: {"params": ...}, NumPy arrays.
      origin: JSON values with which `save` writes it back:
        family, config (their config.json), prefix, head (whether the token
        table was stored a second time as the head), dtype, rounded (how many
        tensors were float64), and skipped (rows before position 0, in base64).
    """

    spec: ModelSpec
    variables: dict
    origin: dict


def load(
    directory: str,
    *,
    param_dtype: str = "float32",
    max_seq_len: int | None = None,
    vocab_size: int | None = None,
) -> Pretrained:
    """Reads a checkpoint.

    Args:
      directory: with config.json and safetensors.
      param_dtype: of the stored weights: `float32`, `bfloat16`, `float16`, or
        `keep` for that of the files.
      max_seq_len: positions to keep, at most those of the checkpoint; None: all.
      vocab_size: ids that are scored, at most the rows of the token table;
        None: all rows, as transformers does. Tables are often padded (OPT:
        50,272 rows, 50,265 tokens), and a tokenizer's own count leaves out ids
        that no text has. The rows stay, the scores of the others do not change.

    Raises:
      InputError: the checkpoint is damaged, incomplete, of another structure,
        has a value that is no finite number, or an argument does not fit it.

    Example:
      >>> model = load("tests/huggingface/fixtures/gpt2_gelu_new")
      >>> model.spec.ffns[0].activation, model.variables["params"]["run_0"]["attn"]["w_qkv"].shape
      ('gelu_tanh', (2, 16, 3, 2, 8))
    """
    check_choice("param_dtype", param_dtype, STORED)
    files = open_files(directory)
    path = os.path.join(directory, CONFIG)
    family = family_of(files.config, path)
    full = spec_from_config(files.config, path, len(files.entries))
    names, prefix = _names(family, files)
    names = _check_tensors(family, full, files, names, prefix)
    if HEAD in names:
        full = dataclasses.replace(full, tied_head=_is_tied(family, full, files, names))
    wanted = places(family, full, full.max_seq_len, full.vocab_size)
    stored = [READ_FLOATS[files.entries[names[name]].dtype] for name in wanted]
    spec = _asked(full, _param_dtype(param_dtype, set(stored), directory), max_seq_len, vocab_size)
    # Memory is asked for here, and used as it is written to.
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_variables(spec)["params"])
    one_dtype = len(set(stored)) == 1 and stored[0] != "float64"
    origin = {
        "family": files.config["model_type"],
        "config": files.config,
        "prefix": prefix,
        "head": HEAD in names and full.tied_head,
        "dtype": stored[0] if one_dtype else "float32",
        "rounded": stored.count("float64"),
    }
    origin["skipped"] = _fill(params, spec, files, names, wanted, origin)
    return Pretrained(spec, {"params": params}, origin)


def _param_dtype(asked: str, stored: set[str], directory: str) -> str:
    """The dtype of the weights; InputError where `keep` names none."""
    if asked != "keep":
        return asked
    if len(stored) > 1 or "float64" in stored:
        raise InputError(
            f"param_dtype: 'keep' is not possible for {directory!r}, which holds "
            f"{' and '.join(sorted(stored))}; name one dtype."
        )
    return stored.pop()


def _asked(full: ModelSpec, param_dtype: str, max_seq_len: int | None, vocab_size: int | None) -> ModelSpec:
    """The spec with the dtype, positions and vocabulary asked for."""
    max_seq_len = full.max_seq_len if max_seq_len is None else max_seq_len
    if max_seq_len > full.max_seq_len:
        raise InputError(
            f"max_seq_len: {max_seq_len} is not allowed; the checkpoint has {full.max_seq_len} positions."
        )
    rows = full.vocab_size
    vocab_size = rows if vocab_size is None else vocab_size
    if vocab_size > rows:
        raise InputError(
            f"vocab_size: {vocab_size} is not allowed; the checkpoint has {rows} rows of tokens."
        )
    multiples = [2**i for i in range(rows.bit_length()) if -(-vocab_size // 2**i) * 2**i == rows]
    multiple = multiples[0] if multiples else rows
    return dataclasses.replace(
        full, max_seq_len=max_seq_len, vocab_size=vocab_size, vocab_multiple=multiple, param_dtype=param_dtype
    )


def _names(family: Family, files: Files) -> tuple[dict[str, str], str]:
    """{name of `places`: name in the files}, and the prefix with which an export writes such names.

    Raises:
      InputError: two tensors have one name, or weights are packed into few bits.
    """
    names: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for stored in (*files.entries, *files.aliases):
        prefixes[stored], name = split_name(stored)
        if stored not in files.entries and name in names:
            continue
        if name in names:
            raise InputError(
                f"pretrained: {said([names[name], stored])} in {files.directory!r} are two tensors for one "
                "place; keep one of them."
            )
        if family is not FAMILIES["gpt2"] or not MASKS.fullmatch(name):
            names[name] = files.aliases.get(stored, stored)
    packed = [
        f"{stored} {files.entries[stored].dtype}"
        for name, stored in names.items()
        if files.entries[stored].dtype in PACKED_DTYPES or PACKED.fullmatch(name)
    ]
    if packed or files.config.get("quantization_config"):
        raise InputError(
            f"pretrained: {files.directory!r} holds quantised weights"
            f"{f' ({said(sorted(packed), 3)})' if packed else ' by its quantization_config'}, which are not "
            "read; use the checkpoint that they were made from."
        )
    before = collections.Counter(prefixes[stored] for stored in names.values()).most_common(1)
    return names, next((p for p in family.prefixes if before and before[0][0].endswith(p)), "")


def _check_tensors(
    family: Family, full: ModelSpec, files: Files, names: dict[str, str], prefix: str
) -> dict[str, str]:
    """The names, that of a token table which is stored as the head only among them.

    Raises:
      InputError: lists all tensors that are missing, extra, of another shape or no floats.
    """
    wanted = places(family, full, full.max_seq_len, full.vocab_size)
    anchor = next(iter(wanted))
    if full.tied_head and anchor not in names and HEAD in names:
        names = {name: stored for name, stored in names.items() if name != HEAD} | {anchor: names[HEAD]}
    shapes = {name: place.shape for name, (place, _) in wanted.items()}
    if HEAD in names:
        shapes[HEAD] = shapes[anchor]
    missing = [full_name(prefix, name) for name in shapes.keys() - names.keys()]
    extra = [stored for name, stored in names.items() if name not in shapes and stored not in files.aliases]
    misshapen, unusable = [], []
    for name in shapes.keys() & names.keys():
        entry = files.entries[names[name]]
        if entry.shape != shapes[name]:
            misshapen.append(f"{names[name]} {list(entry.shape)} for {list(shapes[name])}")
        if entry.dtype not in READ_FLOATS:
            unusable.append(f"{names[name]} {entry.dtype}")
    lists = (
        ("missing", missing),
        ("not known", extra),
        ("of another shape", misshapen),
        ("no floats", unusable),
    )
    if wrong := [f"{what}: {said(sorted(found))}" for what, found in lists if found]:
        raise InputError(
            f"pretrained: the tensors in {files.directory!r} are not those of its {CONFIG}; "
            f"{'; '.join(wrong)}."
        )
    return names


def _is_tied(family: Family, full: ModelSpec, files: Files, names: dict[str, str]) -> bool:
    """Whether the head that is stored is the token table.

    Raises:
      InputError: it is not, and config.json says that it is.
    """
    head, table = names[HEAD], names[next(iter(places(family, full, full.max_seq_len, full.vocab_size)))]
    if head == table:
        return True
    for start in range(0, full.vocab_size, 4096):  # in parts: no copy of the largest tensor
        rows = slice(start, min(start + 4096, full.vocab_size))
        if not np.array_equal(files.read(head, rows), files.read(table, rows), equal_nan=True):
            break
    else:
        return True
    if full.tied_head:
        raise InputError(
            f"pretrained: {head} in {files.directory!r} differs from the token embeddings, and {TIED} in its "
            f"{CONFIG} is not false; say so there if the head is a table of its own."
        )
    return False


def _fill(
    params: dict, spec: ModelSpec, files: Files, names: dict[str, str], wanted: dict, origin: dict
) -> str | None:
    """Copies every tensor into its place; returns the skipped rows in base64."""
    skipped = None
    for name, (place, layer) in wanted.items():
        stored = names[name]
        tensor = files.read(stored)
        check_finite([(stored, tensor)], files.paths[stored])
        view = view_of(params, spec, place, layer)
        with np.errstate(over="ignore"):
            view[...] = tensor[place.skip : place.skip + len(view)]
        if tensor.dtype != view.dtype and not all_finite(view):
            other = "use float32" if spec.param_dtype != "float32" else "no dtype of a model here holds them"
            raise InputError(
                f"param_dtype: {stored} has values beyond the range of {spec.param_dtype}; {other}."
            )
        if place.skip:
            skipped = base64.b64encode(tensor[: place.skip].astype(origin["dtype"]).tobytes()).decode("ascii")
    return skipped


def view_of(params: dict, spec: ModelSpec, place: Place, layer: int | None) -> np.ndarray:
    """Our values of one of their tensors, laid out as theirs: writing to them writes the parameters.

    Args:
      params: the model's, as NumPy arrays.
      spec: the model.
      place: which of our leaves it is, and how it is laid out.
      layer: number of the layer; None: outside the layers.
    """
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


def skipped_rows(origin: dict, n_rows: int, width: int, dtype) -> np.ndarray:
    """The rows before position 0 that a checkpoint came with; zeros for a model that came with none.

    Args:
      origin: what an export keeps of its checkpoint.
      n_rows: how many there are.
      width: E.
      dtype: of the result.
    """
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
