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
    for section, name in (key.split(".") for key in REMOVED):
        for values in _sections(config, section):
            if name in values:
                key = f"{section}.{name}"
                raise InputError(
                    f"{where}: {key} = {values[name]!r} is no option any more; the last commit that reads it "
                    f"is {REMOVED[key]}."
                )
    return config


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


UPGRADES: tuple[Callable[[dict], None], ...] = (
    _add_what_came_without_a_version, _drop_routers_until, _drop_negative_slope,
    _drop_z_loss,
)  # fmt: skip
VERSION = len(UPGRADES)
