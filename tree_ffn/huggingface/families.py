"""Hugging Face's GPT-2 and OPT as data: where each of their tensors stands here.

Both are pre-LN decoders with learned positions and tied embeddings, as ours. What differs:

    GPT-2   matrices are [in, out]; query, key and value are one; `gelu_new` is the tanh form, our `gelu_tanh`
    OPT     matrices are [out, in]; query, key and value stand apart; ReLU; its table of positions has two
            rows before position 0 that no text reads (one is for padding); its ids have their own order

Ids are kept as they are, so a model needs its own tokenizer. Dropout is not read.

Sources: transformers 5.24, models/{gpt2,opt}/modeling_*.py and configuration_*.py (structure, names,
defaults); OPT's offset of 2 is fairseq's, where the padding index 1 shifts positions.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from tree_ffn.models.ffn import total_units
from tree_ffn.models.spec import ModelSpec

HEAD = "lm_head.weight"
# What torch.compile, DataParallel, FSDP and gradient checkpointing put between the parts of a name, and what
# the classes around a decoder put before it.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = re.compile(r"((base_model|model|transformer|decoder)\.)*")

# Their names of activations, and ours. An export says the first name that fits.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of their tensors stands in a layer (or beside the layers) of ours.

    Attributes:
      shape: the tensor's, as they store it.
      leaf: path of our leaf, e.g. "attn/w_qkv".
      view: our leaf as they store it: a view, so that writing to it writes the leaf.
      skip: rows of theirs before those that are ours.
    """

    shape: tuple[int, ...]
    leaf: str
    view: Callable[[np.ndarray], np.ndarray] = lambda leaf: leaf
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """One of their architectures.

    Attributes:
      architecture: the class that transformers loads it with.
      prefixes: what may stand before every name in their files; an export writes the first.
      layer: what stands before the names of layer i.
      keys: {field of ModelSpec, or "ffn": key of config.json}.
      eps_key: key of the norms' epsilon; None where it is always 1e-5.
      activation: the default of `activation_function`.
      fixed: keys that may have this one value only (it is also their default).
      begins: whether every text begins with `bos_token_id`, as the model was trained.
      outer, inner: places beside the layers, and in each of them.
    """

    architecture: str
    prefixes: tuple[str, ...]
    layer: str
    keys: dict[str, str]
    eps_key: str | None
    activation: str
    fixed: dict[str, bool]
    begins: bool
    outer: Callable[[int, int, int], dict[str, Place]]
    inner: Callable[[int, int], dict[str, Place]]


def _gpt2_outer(rows, positions, width):
    return {
        "wte.weight": Place((rows, width), "embed/tokens"),
        "wpe.weight": Place((positions, width), "embed/positions"),
    } | _norm("ln_f", "ln_f", width)


def _gpt2_inner(E, F):
    matrix = lambda *shape: lambda leaf: leaf.reshape(shape)
    return {
        **_norm("ln_1", "ln_1", E),
        "attn.c_attn.weight": Place((E, 3 * E), "attn/w_qkv", matrix(E, 3 * E)),
        "attn.c_attn.bias": Place((3 * E,), "attn/b_qkv", matrix(3 * E)),
        "attn.c_proj.weight": Place((E, E), "attn/w_out", matrix(E, E)),
        "attn.c_proj.bias": Place((E,), "attn/b_out"),
        **_norm("ln_2", "ln_2", E),
        "mlp.c_fc.weight": Place((E, F), "ffn/w_in", np.transpose),
        "mlp.c_fc.bias": Place((F,), "ffn/b_in"),
        "mlp.c_proj.weight": Place((F, E), "ffn/w_out"),
        "mlp.c_proj.bias": Place((E,), "ffn/b_out"),
    }


def _opt_outer(rows, positions, width):
    return {
        "embed_tokens.weight": Place((rows, width), "embed/tokens"),
        "embed_positions.weight": Place((positions + 2, width), "embed/positions", skip=2),
    } | _norm("final_layer_norm", "ln_f", width)


def _opt_inner(E, F):
    places = _norm("self_attn_layer_norm", "ln_1", E)
    for i, name in enumerate("qkv"):
        weight = lambda leaf, i=i: leaf.reshape(E, 3, E)[:, i].T
        bias = lambda leaf, i=i: leaf.reshape(3, E)[i]
        places[f"self_attn.{name}_proj.weight"] = Place((E, E), "attn/w_qkv", weight)
        places[f"self_attn.{name}_proj.bias"] = Place((E,), "attn/b_qkv", bias)
    return places | {
        "self_attn.out_proj.weight": Place((E, E), "attn/w_out", lambda leaf: leaf.reshape(E, E).T),
        "self_attn.out_proj.bias": Place((E,), "attn/b_out"),
        **_norm("final_layer_norm", "ln_2", E),
        "fc1.weight": Place((F, E), "ffn/w_in"),
        "fc1.bias": Place((F,), "ffn/b_in"),
        "fc2.weight": Place((E, F), "ffn/w_out", np.transpose),
        "fc2.bias": Place((E,), "ffn/b_out"),
    }


def _norm(theirs, ours, width):
    return {
        f"{theirs}.weight": Place((width,), f"{ours}/scale"),
        f"{theirs}.bias": Place((width,), f"{ours}/bias"),
    }


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", ("transformer.", ""), "h.{}.",
        {"vocab_size": "vocab_size", "max_seq_len": "n_positions", "width": "n_embd", "n_layers": "n_layer",
         "n_heads": "n_head", "ffn": "n_inner"},
        "layer_norm_epsilon", "gelu_new",
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        False, _gpt2_outer, _gpt2_inner,
    ),
    "opt": Family(
        "OPTForCausalLM", ("model.decoder.", "decoder.", ""), "layers.{}.",
        {"vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "width": "hidden_size",
         "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "ffn": "ffn_dim"},
        None, "relu",
        {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
         "layer_norm_elementwise_affine": True},
        True, _opt_outer, _opt_inner,
    ),
}  # fmt: skip


def split_name(name: str) -> tuple[str, str]:
    """What stands before a name of `places`, wrappers left out, and that name.

    Example:
      >>> split_name("module._orig_mod.transformer.h.0.ln_1.weight")
      ('transformer.', 'h.0.ln_1.weight')
    """
    bare = WRAPPERS.sub("", name)
    prefix = OUTER.match(bare)[0]  # type: ignore[index]  # it matches nothing, too
    return prefix, bare[len(prefix) :]


def full_name(prefix: str, name: str) -> str:
    """A name of `places` with the prefix of the decoder, which the head does not have."""
    return name if name == HEAD else prefix + name


def places(family: Family, spec: ModelSpec, positions: int, rows: int) -> dict[str, tuple[Place, int | None]]:
    """Every tensor of a model in a family's format: {name without prefix: (place, layer or None)}.

    Args:
      family: the format.
      spec: the model; dense layers of one width.
      positions: rows of the position table, the family's offset not counted.
      rows: rows of the token table.

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> spec = ModelSpec(9, 8, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(16),))
      >>> place, layer = places(FAMILIES["opt"], spec, 8, 9)["layers.0.fc2.weight"]
      >>> place.shape, place.leaf, layer
      ((4, 16), 'ffn/w_out', 0)
    """
    found: dict[str, tuple[Place, int | None]] = {
        name: (place, None) for name, place in family.outer(rows, positions, spec.width).items()
    }
    if not spec.tied_head:
        found[HEAD] = Place((rows, spec.width), "embed/head"), None
    inner = family.inner(spec.width, total_units(spec.ffns[0]))
    for i in range(spec.n_layers):
        found |= {family.layer.format(i) + name: (place, i) for name, place in inner.items()}
    return found
