"""Configs as plain values: dicts, lists, numbers and text, whatever they were read with."""

import types
from typing import Any

import numpy as np


def plain(config) -> Any:
    """A config (ConfigDict, dict or Namespace) as plain JSON values; numbers of NumPy become Python's.

    Example:
      >>> plain({"ffn": {"node_width": (1, 2)}})
      {'ffn': {'node_width': [1, 2]}}
      >>> plain({"steps": np.int64(30)})
      {'steps': 30}
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif hasattr(config, "__dict__"):
        config = vars(config)
    if isinstance(config, dict):
        return {name: plain(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config.item() if isinstance(config, np.generic) else config


class Namespace(types.SimpleNamespace):
    """A config as plain values with attributes: `config.optim.lr`, `config["optim"]["lr"]`."""

    __getitem__ = types.SimpleNamespace.__getattribute__


def namespace(value) -> Any:
    """Plain values as a config: dicts as `Namespace`, lists as tuples."""
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
