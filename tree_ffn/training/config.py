"""Configs as plain values: read without ml_collections, written as JSON, compared by key."""

import types
from typing import Any

from tree_ffn.models.build import keys_in_force
from tree_ffn.upgrades import is_gone


def resolved(config) -> Any:
    """A config (ConfigDict, dict or namespace) as plain JSON values.

    Example:
      >>> resolved({"ffn": {"node_width": (1, 2)}})
      {'ffn': {'node_width': [1, 2]}}
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif hasattr(config, "__dict__"):
        config = vars(config)
    if isinstance(config, dict):
        return {name: resolved(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [resolved(value) for value in config]
    return config


class Namespace(types.SimpleNamespace):
    """A config without ml_collections: `config.optim.lr`, `config["optim"]["lr"]`."""

    __getitem__ = types.SimpleNamespace.__getattribute__


def namespace(value):
    """JSON values as a config: dicts as `Namespace`, lists as tuples."""
    if isinstance(value, dict):
        return Namespace(**{name: namespace(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(namespace(item) for item in value)
    return value


def flat(config: dict, prefix: str = "") -> dict:
    """{"optim.lr": 1e-3, ...} of a nested dict."""
    values = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values.update(flat(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def _in_force(config: dict) -> dict:
    ffn, model = config.get("ffn"), config.get("model")
    if not (isinstance(ffn, dict) and "kind" in ffn) or is_gone(ffn):
        return config
    layers = model.get("layers", "") if isinstance(model, dict) else ""
    return {**config, "ffn": keys_in_force(ffn, str(layers))}


def differing_keys(old: dict, new: dict) -> dict[str, tuple]:
    """{key: (old value, new value)} of two nested dicts; a missing value is None.

    Of a config's section `ffn`, keys that none of its layers reads do not count.
    """
    old, new = flat(_in_force(old)), flat(_in_force(new))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
