"""From a config to a ModelSpec: the door where a config's values are checked."""

import numbers
from contextlib import contextmanager
from typing import Any

from tree_ffn.errors import InputError, check_choice, check_positive_int, is_whole_number
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.moe import MoESpec
from tree_ffn.models.spec import DTYPES, FFNSpec, InitSpec, ModelSpec, check_implementations
from tree_ffn.tree import IMPLEMENTATIONS, TreeShape, TreeSpec
from tree_ffn.tree.leaf import LeafSpec

KINDS = ("dense", "narrow", "moe", "hash", "tree", "random_tree", "hash_tree", "leaf")

MODEL_FIELDS = (
    "width", "n_layers", "n_heads", "context", "dtype", "param_dtype", "remat", "norm_eps", "vocab_multiple",
    "unroll",
)  # fmt: skip
TREE_FIELDS = (
    "activation", "act_site", "routing", "router", "gate", "openness", "kappa", "beta",
    "balance", "balance_rate", "hash_levels", "leak", "leak_share", "renormalise",
    "gate_norm", "beam",
)  # fmt: skip
MOE_FIELDS = (
    "n_experts", "top_k", "renormalise", "balance_rate", "aux_weight", "activation",
    "leak", "leak_share", "expert_groups", "gate_norm",
)  # fmt: skip


def model_spec_from_config(config, vocab_size: int) -> ModelSpec:
    """The model that `config.model` and `config.ffn` describe.

    Args:
      config: a ConfigDict, or anything with its attributes (see
        configs/common.py for all of them).
      vocab_size: V, the tokenizer's.

    Raises:
      InputError: names the config's field, its value and what is allowed.

    Example:
      >>> from configs.default import get_config   # doctest: +SKIP
      >>> model_spec_from_config(get_config("preset=nano"), vocab_size=257).width   # doctest: +SKIP
      128
    """
    model, ffn = config.model, config.ffn
    check_choice("ffn.implementation", ffn.implementation, ("auto", *IMPLEMENTATIONS))
    check_positive_int("model.n_layers", model.n_layers)
    check_choice("model.param_dtype", model.param_dtype, DTYPES)  # float16 would need its loss scaled
    kinds = layer_kinds(model.layers, model.n_layers, ffn.kind)
    specs = {kind: ffn_spec(ffn, kind) for kind in kinds}
    if ffn.implementation != "auto":
        with _named("ffn."):
            check_implementations(ffn.implementation, tuple(specs.values()))
    scales = ("embed", "attn_in", "attn_out", "w_in", "w_out")
    with _named("model."):
        return ModelSpec(
            vocab_size=vocab_size,
            ffns=tuple(specs[kind] for kind in kinds),
            implementation=None if ffn.implementation == "auto" else ffn.implementation,
            init=InitSpec(**{name: getattr(model.init, name) for name in scales}),
            **_fields(model, MODEL_FIELDS),
        )


def layer_kinds(pattern: str, n_layers: int, default: str) -> tuple[str, ...]:
    """The kind of every layer that `model.layers` names.

    Args:
      pattern: kinds, comma separated, each with an optional count; '' means
        `default` everywhere.
      n_layers: how many there must be.
      default: `ffn.kind`.

    Raises:
      InputError: an unknown kind, a bad count, or another number of layers.

    Example:
      >>> layer_kinds("dense,tree*2,dense", 4, "tree")
      ('dense', 'tree', 'tree', 'dense')
    """
    check_choice("ffn.kind", default, KINDS)
    if not pattern:
        return (default,) * n_layers
    runs: list[tuple[str, int]] = []
    for item in pattern.split(","):
        kind, star, count = (part.strip() for part in item.partition("*"))
        check_choice("model.layers", kind, KINDS)
        if star and (not is_whole_number(count) or int(count) < 1):
            raise InputError(
                f"model.layers: {item.strip()!r} is not allowed; write a kind and a count of at least 1, "
                "e.g. tree*10."
            )
        runs.append((kind, int(count) if star else 1))
    if (named := sum(count for _, count in runs)) != n_layers:
        raise InputError(
            f"model.layers: {pattern!r} names {named} layers, but model.n_layers is {n_layers}; "
            "make them equal."
        )
    return tuple(kind for kind, count in runs for _ in range(count))


def ffn_spec(ffn, kind: str) -> FFNSpec:
    """The layer that `config.ffn` describes when its kind is `kind`.

    `dense` has `width` units, or F of the tree fields where that is 0, and `narrow` their A; `moe` and `leaf`
    have experts of `expert_width` units, or of A / top_k where that is 0; `hash` is `moe` with one expert
    chosen by a hash of the token's id, whatever `top_k`, `expert_groups` and `moe_balance` say;
    `random_tree` is a tree with frozen random routers and hard routing, whatever `routing` says,
    `hash_tree` one whose `hash_levels` are all of its depth.

    Raises:
      InputError: names the config's field, its value and what is allowed.
    """
    check_choice("ffn.kind", kind, KINDS)
    with _named("ffn."):
        shape = TreeShape(ffn.n_trees, ffn.depth, _node_width(ffn.node_width), ffn.shared_width)
        fields = _fields(ffn, TREE_FIELDS)
        if kind != "tree":  # gates of moe, or of no layer; and no decisions to search
            fields |= {"renormalise": False, "beam": 1, "gate_norm": 1}
        if kind == "random_tree":
            fields |= {"routing": "hard", "router": "frozen"}
        elif kind == "hash_tree":
            fields |= {"routing": "hard", "hash_levels": shape.depth, "balance": "none"}
        trees = TreeSpec(shape, **fields)
        if kind in ("dense", "narrow"):
            check_positive_int("width", ffn.width, least=0)
            width = trees.active_units if kind == "narrow" else ffn.width or trees.total_units
            return DenseSpec(width, ffn.activation)
        if kind == "moe":
            check_positive_int("top_k", ffn.top_k)
            check_choice("moe_balance", ffn.moe_balance, ("none", "aux", "bias"))
            width = ffn.expert_width or max(1, trees.active_units // ffn.top_k)
            return MoESpec(expert_width=width, balance=ffn.moe_balance, **_fields(ffn, MOE_FIELDS))
        if kind == "leaf":
            return _leaf_spec(ffn, trees.active_units)
        if kind == "hash":
            values = _fields(ffn, MOE_FIELDS) | {"top_k": 1, "expert_groups": 1}
            width = ffn.expert_width or trees.active_units
            return MoESpec(expert_width=width, balance="none", router="hash", **values)
        return trees


def _leaf_spec(ffn, active_units: int) -> LeafSpec:
    if ffn.leak not in (0.0, 1.0):
        raise InputError(f"leak: {ffn.leak!r} is not allowed with kind 'leaf'; use 1 (a dense start) or 0.")
    check_choice("moe_balance", ffn.moe_balance, ("none", "bias"))
    check_positive_int("top_k", ffn.top_k)
    return LeafSpec(
        n_experts=ffn.n_experts,
        expert_width=ffn.expert_width or max(1, active_units // ffn.top_k),
        top_k=ffn.top_k,
        router=ffn.leaf_router,
        n_trees=ffn.leaf_trees,
        search=ffn.search,
        gate_norm={1: "l1", 2: "l2", 3: "rms"}.get(ffn.gate_norm, "") if ffn.renormalise else "none",
        balance_rate=ffn.balance_rate if ffn.moe_balance == "bias" else 0.0,
        dense_start=ffn.leak_share if ffn.leak else 0.0,
        activation=ffn.activation,
    )


def _fields(section, names) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


def _node_width(value):
    """A single width for all levels may be written as a number or as a tuple of one."""
    if isinstance(value, numbers.Integral):
        return value
    return value[0] if len(value) == 1 else tuple(value)


@contextmanager
def _named(prefix: str):
    """Puts the config section before the field that an InputError names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None
