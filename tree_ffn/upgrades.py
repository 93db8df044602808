"""Versioned upgrades of recorded configs: what an old one means is said here, and by no default of today.

A config of a run or a results row, and a model of an export or a checkpoint (`models.spec_to_dict`), say
their `config_version`; one that does not is of version 0, as all were until 2026-11-30. Each function of
`UPGRADES` leads from one version to the next. Plain dicts in, plain dicts out.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from tree_ffn.errors import InputError

KEY = "config_version"

# Keys that were added while configs had no version, and what was computed before.
ADDED = {
    "model": {"unroll": 1},
    "ffn": {
        "router": "first_unit", "openness": "exponential", "hash_levels": 0, "leak": 0.0, "leak_share": 0.3,
        "expert_groups": 1, "gate_norm": 1, "beam": 1, "leaf_trees": 1, "leaf_router": "tree",
        "search": "best",
    },
    "train": {"probe": False},
}  # fmt: skip
TREE_ADDED = {
    "openness": "exponential", "hash_levels": 0, "leak": 0.0, "leak_share": 0.3, "renormalise": False,
    "gate_norm": 1, "beam": 1,
}  # fmt: skip
ADDED_TO_MODELS = {"unroll": 1, "tied_head": True}
ADDED_TO_LAYERS = {
    "tree": TREE_ADDED,
    "pruned_tree": TREE_ADDED,
    "moe": {"router": "softmax", "expert_groups": 1, "gate_norm": 1, "leak": 0.0, "leak_share": 0.3},
}

# Keys that are gone, and the last commit that reads configs in which they stand at another value than the
# one that everything computes now. Upgrades leave those in place: rows are still told apart by them.
REMOVED = {
    "ffn.balance_floor": "25fb495",
    "optim.routers_until": "6211090",
    "ffn.negative_slope": "6211090",
    "train.z_loss": "6211090",
}


LAST_OF_MANY = "30983ff"  # the last commit with trees of continuous gates, mixtures in groups, shared units
LAST_OF_EXACT = "389f439"  # the last commit in which a leaf layer finds the K best of all leaves


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config, or a model as a dict, as it would be recorded now.

    Args:
      config: of any version; it is not changed.

    Raises:
      InputError: its version is none that is known.

    Example:
      >>> upgraded({"train": {"steps": 9}})["train"]
      {'steps': 9, 'probe': False}
    """
    version = config.get(KEY, 0)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION:
        raise InputError(
            f"{KEY}: {version!r} is not known; use one from 0 to {VERSION}, or a newer tree_ffn."
        )
    if version < VERSION:
        config = copy.deepcopy(config)
        for upgrade in UPGRADES[version:]:
            upgrade(config)
        config[KEY] = VERSION
    model = config.get("model")
    if isinstance(model, dict) and "ffns" in model and model.get(KEY) != VERSION:  # of fine-tuned models
        config = {**config, "model": upgraded(model)}
    return config


def readable(config: dict[str, Any], where: str) -> dict[str, Any]:
    """`upgraded`, for what is to be computed with: a run, or a model.

    Args:
      config: of any version; it is not changed.
      where: names it in errors.

    Raises:
      InputError: its version is not known, or it uses an option that is gone.
    """
    config = upgraded(config)
    for key, value, commit in _options_that_are_gone(config):
        raise InputError(
            f"{where}: {key} = {value!r} is no option any more; the last commit that reads it is {commit}."
        )
    return config


def _options_that_are_gone(config: dict) -> Iterator[tuple[str, Any, str]]:
    """(key, value, last commit that reads it) of what an upgraded config uses and nothing computes."""
    for key, commit in REMOVED.items():
        section, name = key.split(".")
        yield from ((key, values[name], commit) for values in _sections(config, section) if name in values)
    for ffn in _sections(config, "ffn"):
        if _is_one_of_many(ffn):
            name = next(_gone(ffn), "kind")
            yield f"ffn.{name}", ffn.get(name), LAST_OF_MANY
        elif "search" in ffn:
            yield "ffn.search", ffn["search"], LAST_OF_EXACT


def is_gone(ffn: dict) -> bool:
    """Whether an upgraded layer, or section `ffn`, is one that nothing computes any more."""
    return _is_one_of_many(ffn) or "search" in ffn


def _is_one_of_many(ffn: dict) -> bool:
    """Such a one still has all keys of version 4: no upgrade could take it apart."""
    return "kappa" in ffn or "aux_weight" in ffn


def named_kinds(ffn: dict, layers: str) -> set[str]:
    """Kinds of a section `ffn`: its own, and those that `model.layers` names.

    Example:
      >>> sorted(named_kinds({"kind": "leaf"}, "dense, tree*2"))
      ['dense', 'leaf', 'tree']
    """
    return {ffn["kind"], *(item.partition("*")[0].strip() for item in layers.split(",") if item)}


def stamped(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its `config_version`: this library's, unless it says one."""
    return {KEY: VERSION, **config}


def _sections(config: dict, name: str) -> Iterator[dict]:
    """The dicts that hold keys of a section: of a model, the `ffn` of every layer and its shape."""
    if name == "ffn" and isinstance(config.get("ffns"), list):
        for ffn in config["ffns"]:
            yield from (values for values in (ffn, _get(ffn, "shape")) if isinstance(values, dict))
    elif isinstance(section := config.get(name), dict) and "ffns" not in section:
        yield section


def _get(values, name):
    return values.get(name) if isinstance(values, dict) else None


def _drop(config: dict, key: str, neutral, used: Callable[[dict], bool] = lambda section: True) -> None:
    """Removes a key where it stands at the value that everything computes now, or is not used."""
    section, name = key.split(".")
    for values in _sections(config, section):
        if name in values and (values[name] == neutral or not used(values)):
            del values[name]


def _add_what_came_without_a_version(config: dict) -> None:
    """Version 1: every key that had come by 2026-11-30; `balance_floor` had come and gone."""
    if "ffns" in config:
        _add(config, ADDED_TO_MODELS)
        for ffn in _sections(config, "ffn"):
            kind = ffn.get("kind")
            _add(ffn, ADDED_TO_LAYERS.get(kind, {}) if isinstance(kind, str) else {})
    else:
        for name, values in ADDED.items():
            for section in _sections(config, name):
                _add(section, values)
    _drop(config, "ffn.balance_floor", 0.5)


def _add(section: dict, values: dict) -> None:
    section.update({name: value for name, value in values.items() if name not in section})


def _drop_routers_until(config: dict) -> None:
    """Version 2: routers learn to the end."""
    _drop(config, "optim.routers_until", 1.0)


def _drop_negative_slope(config: dict) -> None:
    """Version 3: leaky_relu has a slope of .01 below 0."""
    _drop(config, "ffn.negative_slope", 0.01, lambda ffn: ffn.get("activation") == "leaky_relu")


def _drop_z_loss(config: dict) -> None:
    """Version 4: the loss is the cross-entropy, and what balances experts."""
    _drop(config, "train.z_loss", 0.0)


# Keys that layers of version 4 have, and section `ffn` of a config.
EXPERTS = {
    "n_experts", "expert_width", "top_k", "renormalise", "gate_norm", "leak", "leak_share", "balance_rate",
}  # fmt: skip
PATHS = {"act_site", "routing", "router", "beta", "balance", "balance_rate", "leak"}
MANY = {
    "moe": {"activation", "balance", "router", *EXPERTS},
    "tree": {"activation", "shape", *PATHS},
    "pruned_tree": {"activation", "shape", "nodes", *PATHS},
    "config": {
        "kind", "activation", "implementation", "width", "n_trees", "depth", "node_width", "shared_width",
        "leaf_router", "leaf_trees", "search", "moe_balance", *EXPERTS, *PATHS,
    },
}  # fmt: skip


def _two_layers(config: dict) -> None:
    """Version 5: a leaf layer and a path layer; of a recorded config, only the keys that are in force.

    A mixture or a hash of experts is a leaf layer behind another router. Trees keep hard and straight-through
    paths. What neither computes stays as it is, and `readable` refuses it by the key that says so.
    """
    if "ffns" in config:
        layers = config["ffns"] if isinstance(config["ffns"], list) else []
        config["ffns"] = [_layer(ffn) if isinstance(ffn, dict) else ffn for ffn in layers]
    elif isinstance(ffn := config.get("ffn"), dict) and "kind" in ffn:
        if len(named_kinds(ffn, str(_get(config.get("model"), "layers") or ""))) == 1:
            config["ffn"] = _section(ffn)


def _layer(ffn: dict) -> dict:
    """A layer of a model, of the two kinds that there are; as it is if it is neither."""
    kind = ffn.get("kind")
    if not MANY.get(str(kind), {"?"}) <= ffn.keys() or not isinstance(ffn.get("shape", {}), dict):
        return ffn  # damaged
    if kind == "moe" and not _has_gone(ffn):
        own = _experts(ffn, ffn["balance"])
        return {"kind": "leaf", "activation": ffn["activation"], **own, "n_kept": 0}
    if kind == "leaf":
        return {**ffn, "n_kept": 0}
    if kind not in ("tree", "pruned_tree") or _has_gone(ffn):
        return ffn
    shape = {name: value for name, value in ffn["shape"].items() if name != "shared_width"}
    kept = ("kind", "activation", "act_site", "routing", "router", *(["nodes"] if "nodes" in ffn else []))
    return {"shape": shape, **{name: ffn[name] for name in kept}, "balance_rate": _rate_of_paths(ffn)}


def _section(ffn: dict) -> dict:
    """Section `ffn` of a config; as it is if neither layer computes it."""
    if not MANY["config"] <= ffn.keys():
        return ffn  # damaged, or one of today that says no version
    kind, common = ffn["kind"], {name: ffn[name] for name in ("kind", "activation", "implementation")}
    if kind not in ("dense", "narrow", "moe", "hash", "tree", "random_tree", "leaf") or _has_gone(ffn):
        return ffn
    total, active = units_of_paths(ffn)
    if kind in ("dense", "narrow"):
        return common | {"width": active if kind == "narrow" else ffn["width"] or total}
    if kind in ("tree", "random_tree"):
        own = {name: ffn[name] for name in ("n_trees", "depth", "node_width", "act_site")}
        own["routing"] = ffn["routing"] if kind == "tree" else "hard"
        return common | own | {"balance_rate": _rate_of_paths(ffn)}
    values = {**ffn, "top_k": 1, "router": "hash"} if kind == "hash" else ffn
    if kind == "leaf":
        values = {**ffn, "router": ffn["leaf_router"]}
    width = ffn["expert_width"] or max(1, active // values["top_k"])
    own = _experts({**values, "expert_width": width}, "none" if kind == "hash" else ffn["moe_balance"])
    if kind == "leaf":
        own |= {"n_trees": ffn["leaf_trees"], "search": ffn["search"]}
    return common | own | {"kind": "leaf"}


def _experts(ffn: dict, balance: str) -> dict:
    """Fields of a leaf layer. Gates of one expert over their own norm are 1, as hash's are."""
    router = "softmax" if ffn["router"] in ("first_unit", "silent") else ffn["router"]
    normed = ffn["renormalise"] and router != "hash"
    norm = {1: "l1", 2: "l2", 3: "rms"}[ffn["gate_norm"]] if normed else "none"
    return {
        **{name: ffn[name] for name in ("n_experts", "expert_width", "top_k")},
        "router": router, "n_trees": 1, "search": "best", "gate_norm": norm,
        "balance_rate": ffn["balance_rate"] if balance == "bias" else 0.0,
        "dense_start": ffn["leak_share"] if ffn["leak"] else 0.0,
    }  # fmt: skip


def _rate_of_paths(ffn: dict) -> float:
    return ffn["balance_rate"] if ffn["balance"] == "sign" else 0.0


def units_of_paths(ffn: dict) -> tuple[int, int]:
    """F and A of the trees of a section `ffn` of version 4, which said those of other kinds too."""
    widths = ffn["node_width"] if isinstance(ffn["node_width"], (list, tuple)) else [ffn["node_width"]]
    widths = list(widths) * (ffn["depth"] + 1 if len(widths) == 1 else 1)
    if ffn["router"] == "silent":  # whose row, of decisions that are no hash's, was no unit
        decides = range(ffn["hash_levels"], ffn["depth"])
        widths = [width - (level in decides) for level, width in enumerate(widths)]
    shared = ffn["shared_width"]
    total = ffn["n_trees"] * sum(2**level * width for level, width in enumerate(widths)) + shared
    return total, ffn["n_trees"] * sum(widths) + shared


def _has_gone(ffn: dict) -> bool:
    """Whether a layer or a section of version 4 has in force what no layer computes any more."""
    return next(_gone(ffn), None) is not None or any(f"ffn.{name}" in REMOVED for name in ffn)


def _gone(ffn: dict) -> Iterator[str]:
    """Names of the options that a layer or a section of version 4 has in force and no layer any more."""
    kind, shape = ffn.get("kind"), ffn.get("shape", ffn)
    shape = shape if isinstance(shape, dict) else {}
    of_layer = "shape" in ffn  # of a model: what training alone reads does not matter
    if kind in ("tree", "pruned_tree", "random_tree", "hash_tree"):
        yield from ["kind"] if kind == "hash_tree" else []
        yield from ["shared_width"] if shape.get("shared_width") else []
        yield from ["hash_levels"] if ffn.get("hash_levels") else []
        yield from ["leak"] if ffn.get("leak") and not of_layer else []
        if kind != "random_tree":
            yield from ["routing"] if ffn.get("routing") == "continuous" else []
            yield from ["router"] if ffn.get("router") == "silent" else []
            yield from ["beta"] if ffn.get("routing") == "straight_through" and ffn.get("beta") != 1 else []
    elif kind in ("moe", "hash", "leaf"):
        yield from ["expert_groups"] if kind == "moe" and ffn.get("expert_groups", 1) != 1 else []
        yield from ["leak"] if ffn.get("leak") not in (0, 1) else []
        yield from ["moe_balance"] if kind == "moe" and ffn.get("moe_balance") == "aux" else []
        one = kind != "hash" and ffn.get("top_k") == 1 and ffn.get("router") != "hash"
        yield from ["renormalise"] if one and ffn.get("renormalise") else []


def _one_search(config: dict) -> None:
    """Version 6: trees are searched by a beam of K, flat routers for the K best; of timings too, in `spec`.

    The K best of all leaves stay where a beam may find others; `readable` refuses them.
    """
    layers = str(_get(config.get("model"), "layers") or "")
    for ffn in (*_sections(config, "ffn"), *_sections(config, "spec")):
        is_leaf = "kind" not in ffn or "leaf" in named_kinds({"kind": str(ffn["kind"])}, layers)
        if not _is_one_of_many(ffn) and not (is_leaf and _finds_the_best(ffn)):
            ffn.pop("search", None)


def _finds_the_best(ffn: dict) -> bool:
    """Whether it is the K best of all leaves, and a beam may find others: it drops nodes above leaves."""
    if (ffn.get("router"), ffn.get("search")) != ("tree", "best"):
        return False
    n_trees, top_k, n_experts = (ffn.get(name) for name in ("n_trees", "top_k", "n_experts"))
    if not (isinstance(n_trees, int) and isinstance(top_k, int) and isinstance(n_experts, int)):
        return False  # damaged
    return top_k < n_trees or top_k < n_experts / 2


RENAMED = {
    "model": {"context": "max_seq_len"},
    "train": {"accumulation": "grad_accum_steps"},
    "optim": {"warmup": "warmup_steps", "clip": "clip_norm"},
}


def _field_names(config: dict) -> None:
    """Version 7: the names that the field has for them, of a config and of a model."""
    if "ffns" in config:
        _rename(config, RENAMED["model"])
    for section, names in RENAMED.items():
        for values in _sections(config, section):
            _rename(values, names)


def _rename(section: dict, names: dict[str, str]) -> None:
    renamed = {names.get(name, name): value for name, value in section.items()}
    section.clear()
    section.update(renamed)


def _drop_data_format(config: dict) -> None:
    """Version 8: prepared rows are kept in one format; which one it was changed no row."""
    for data in _sections(config, "data"):
        data.pop("format", None)


def _name_what_is_recomputed(config: dict) -> None:
    """Version 9: `remat` names what is computed again, of a config and of a model; it was all or nothing."""
    for model in (config, *_sections(config, "model")):
        if isinstance(model.get("remat"), bool):
            model["remat"] = "full" if model["remat"] else "none"


def _add_guards(config: dict) -> None:
    """Version 10: no step was skipped, and the optimizer had no weights of its own."""
    for optim in _sections(config, "optim"):
        _add(optim, {"skip_above": 0.0, "skip_at_most": 10, "master_weights": False})


UPGRADES: tuple[Callable[[dict], None], ...] = (
    _add_what_came_without_a_version, _drop_routers_until, _drop_negative_slope,
    _drop_z_loss, _two_layers, _one_search, _field_names, _drop_data_format,
    _name_what_is_recomputed, _add_guards,
)  # fmt: skip
VERSION = len(UPGRADES)
