"""From a config to a ModelSpec: the door where a config's values are checked."""

import dataclasses
import numbers
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

from tree_ffn.errors import InputError, check_choice, check_positive_int, is_whole_number
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.spec import DTYPES, FFNSpec, InitSpec, ModelSpec
from tree_ffn.plain import namespace, plain
from tree_ffn.tree import IMPLEMENTATIONS, LeafSpec, TreeShape, TreeSpec
from tree_ffn.upgrades import named_kinds

SIZES = ("n_layers", "width", "n_heads", "max_seq_len")

# Sizes of models by name: `--config.model.preset=opt_125m`. From 125M on they are those of OPT's decoders
# (Zhang et al. 2022, arXiv 2205.01068, table 1); `opt_350m` is pre-LN and 1024 wide throughout here. A layer
# has about 4 E feed-forward units in all of them.
PRESETS = {
    "nano": (4, 128, 4, 128),  #         0.9 M parameters with bytes as tokens
    "micro": (6, 256, 4, 256),  #        4.9 M
    "mini": (9, 512, 8, 512),  #          29 M
    "opt_125m": (12, 768, 12, 2048),  #   87 M; 125 M with OPT's 50,272 tokens
    "opt_350m": (24, 1024, 16, 2048),  # 305 M
    "opt_1.3b": (24, 2048, 32, 2048),  # 1.2 G
    "opt_2.7b": (32, 2560, 32, 2048),  # 2.5 G
    "opt_6.7b": (32, 4096, 32, 2048),  # 6.5 G
}

KINDS = ("dense", "narrow", "leaf", "tree", "random_tree")
DENSE_COUNTS = {"dense": "n_experts", "narrow": "top_k"}  # of experts, whose units they have by default


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """What section `model` says beside the fields of a ModelSpec.

    Attributes:
      preset: a name of `PRESETS`, whose sizes stand where none is set; none: micro.
      layers: kinds of the feed-forward layers, first to last, e.g. `dense,leaf*4,dense`; none: `ffn.kind`.
    """

    preset: str = ""
    layers: str = ""


@dataclasses.dataclass(frozen=True)
class FFNChoice:
    """What section `ffn` says beside the fields of the layers.

    Attributes:
      kind: of the layers: `dense`, `narrow` (a smaller dense one), `leaf`, `tree` (the paper's path layer) or
        `random_tree` (`tree` with random routers that nothing trains, and hard routing).
      width: units of `dense` and `narrow`; 0: n_experts or top_k times expert_width.
      implementation: how layers are computed: `auto` (by a measured rule), `masked`, `gather` or `grouped`.
    """

    kind: str = "leaf"
    width: int = 0
    implementation: str = "auto"


# Fields of the specs that a config does not say.
NOT_OF_MODELS = ("vocab_size", "ffns", "implementation", "tied_head", "scan", "init")
NOT_OF_LEAVES = ("n_kept",)
NOT_OF_TREES = ("shape", "router")


def fields_of(spec_class, *without: str) -> tuple[str, ...]:
    """Names of a spec's fields, but for some."""
    return tuple(field.name for field in dataclasses.fields(spec_class) if field.name not in without)


MODEL_FIELDS = fields_of(ModelSpec, *NOT_OF_MODELS)
LEAF_FIELDS = fields_of(LeafSpec, *NOT_OF_LEAVES)
TREE_FIELDS = fields_of(TreeSpec, *NOT_OF_TREES)


def with_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """A config as plain values with the sizes that it leaves open, those that are None.

    Those of a model are its preset's; experts have E / 128 units and nodes E / 64, one at least.

    Raises:
      InputError: the preset is not known.
    """
    model, ffn = config.get("model"), config.get("ffn")
    if not isinstance(model, dict):
        return config
    if any(model.get(name, 0) is None for name in SIZES):
        model = model | {
            name: size for name, size in sizes_of(model["preset"]).items() if model[name] is None
        }
    found = {**config, "model": model}
    if isinstance(ffn, dict) and isinstance(width := model.get("width"), numbers.Integral):
        parts = {"expert_width": max(1, width // 128), "node_width": [max(1, width // 64)]}
        found["ffn"] = ffn | {name: size for name, size in parts.items() if ffn.get(name, 0) is None}
    return found


def model_spec_from_config(config, vocab_size: int) -> ModelSpec:
    """The model that `config.model` and `config.ffn` describe.

    Args:
      config: a ConfigDict, or anything with its attributes (see `tree_ffn.config` for all of them).
      vocab_size: V, the tokenizer's.

    Raises:
      InputError: names the config's field, its value and what is allowed.

    Example:
      >>> from tree_ffn.config import make_config
      >>> model_spec_from_config(make_config({"model.preset": "nano"}), vocab_size=257).width
      128
    """
    sections = with_sizes({"model": plain(config.model), "ffn": plain(config.ffn)})
    model, ffn = namespace(sections["model"]), namespace(sections["ffn"])
    check_choice("ffn.implementation", ffn.implementation, ("auto", *IMPLEMENTATIONS))
    check_positive_int("model.n_layers", model.n_layers)
    check_choice("model.param_dtype", model.param_dtype, DTYPES)  # float16 would need its loss scaled
    kinds = layer_kinds(model.layers, model.n_layers, ffn.kind)
    specs = {kind: ffn_spec(ffn, kind) for kind in kinds}
    with _named("model."):
        return ModelSpec(
            vocab_size=vocab_size,
            ffns=tuple(specs[kind] for kind in kinds),
            implementation=None if ffn.implementation == "auto" else ffn.implementation,
            init=InitSpec(**_fields(model.init, fields_of(InitSpec))),
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

    `dense` and `narrow` have `width` units; where that is 0, F or A of the leaf layer that the other fields
    describe. `random_tree` is `tree` with frozen random routers and hard routing, whatever `routing` says.

    Raises:
      InputError: names the config's field, its value and what is allowed.
    """
    check_choice("ffn.kind", kind, KINDS)
    with _named("ffn."):
        if kind in DENSE_COUNTS:
            check_positive_int("width", ffn.width, least=0)
            if ffn.width:
                return DenseSpec(ffn.width, ffn.activation)
            count = DENSE_COUNTS[kind]
            for name in (count, "expert_width"):
                check_positive_int(name, getattr(ffn, name))
            return DenseSpec(getattr(ffn, count) * ffn.expert_width, ffn.activation)
        if kind == "leaf":
            return LeafSpec(**_fields(ffn, LEAF_FIELDS))
        shape = TreeShape(ffn.n_trees, ffn.depth, _node_width(ffn.node_width))
        fields = _fields(ffn, TREE_FIELDS)
        if kind == "random_tree":
            fields |= {"routing": "hard", "router": "frozen"}
        return TreeSpec(shape, **fields)


def _fields(section, names) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


def check_set(keys: Iterable[str], config) -> None:
    """Raises InputError if somebody set a key of `config.ffn` that no layer of the model reads.

    Args:
      keys: dotted, those that were set, of any section.
      config: what they were set in, as of `model_spec_from_config`.

    Example:
      >>> from tree_ffn.config import make_config
      >>> make_config({"ffn.kind": "leaf", "ffn.depth": 3})
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: ffn.depth: 3 does nothing for layers of kind leaf; leave it out.
    """
    ffn = plain(config.ffn)
    kinds = named_kinds(ffn, config.model.layers)
    if not kinds <= set(KINDS):
        return  # `model_spec_from_config` says so
    read, of_kind = _keys_read(kinds), " and ".join(sorted(kinds))
    for kind, count in DENSE_COUNTS.items():
        if kind in kinds:
            read |= {"width"} if ffn["width"] else {"width", count, "expert_width"}
    for key in keys:
        section, _, name = key.partition(".")
        if section == "ffn" and (name := name.partition("[")[0]) and name not in read:
            of_width = f" and width {ffn['width']}" if "width" in read and ffn["width"] else ""
            raise InputError(
                f"ffn.{name}: {ffn[name]!r} does nothing for layers of kind {of_kind}{of_width}; leave it "
                "out."
            )


def _keys_read(kinds: set[str]) -> set[str]:
    """The keys of a section `ffn` that layers read, but for sizes of dense ones."""
    names = {"kind", "activation"}
    names |= {"implementation"} if kinds - DENSE_COUNTS.keys() else set()
    names |= set(LEAF_FIELDS) if "leaf" in kinds else set()
    names |= {"n_trees", "depth", "node_width", *TREE_FIELDS} if kinds & {"tree", "random_tree"} else set()
    return names if kinds & {"tree"} else names - {"routing"}


def keys_in_force(ffn: dict, layers: str = "") -> dict[str, Any]:
    """The keys of a recorded section `ffn` that its layers read: with these equal, models are equal.

    Args:
      ffn: of a config as it is recorded now.
      layers: `model.layers`.

    Example:
      >>> ffn = {"kind": "dense", "width": 0, "n_experts": 8, "expert_width": 2, "top_k": 3, "depth": 7}
      >>> keys_in_force(ffn)
      {'kind': 'dense', 'width': 16}
    """
    kinds = named_kinds(ffn, layers)
    found = {name: value for name, value in ffn.items() if name in _keys_read(kinds)}
    for kind in kinds & DENSE_COUNTS.keys():
        of_leaves = ffn.get(DENSE_COUNTS[kind], 0) * ffn.get("expert_width", 0)
        found["width" if len(kinds) == 1 else f"width of {kind}"] = ffn["width"] or of_leaves
    return found


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


def sizes_of(preset: str) -> dict[str, int]:
    """The sizes that a name stands for; '' is micro.

    Raises:
      InputError: the name is not known.

    Example:
      >>> sizes_of("nano")["width"]
      128
    """
    check_choice("model.preset", preset, (*PRESETS, ""))
    return dict(zip(SIZES, PRESETS[preset or "micro"]))
