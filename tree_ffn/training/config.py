"""Configs of runs: with every value that follows others, and compared by key."""

from typing import Any

from tree_ffn.data.spec import with_corpus
from tree_ffn.models.from_config import keys_in_force, with_sizes
from tree_ffn.plain import Namespace, flat, namespace, plain
from tree_ffn.training.optimizer import with_warmup
from tree_ffn.upgrades import is_gone


def resolved(config) -> Any:
    """A config (ConfigDict, dict or Namespace) as plain JSON values; what follows other values has its own.

    This is what runs record.

    Example:
      >>> resolved({"train": {"steps": 50}, "optim": {"warmup_steps": None, "warmup_share": 0.1}})["optim"]
      {'warmup_steps': 5, 'warmup_share': 0.1}
    """
    return with_warmup(with_corpus(with_sizes(plain(config))))


def settled(config) -> Namespace:
    """`resolved`, with attributes: what a run computes with."""
    return namespace(resolved(config))


def _in_force(config: dict) -> dict:
    """A recorded config without the keys that nothing reads: with the others equal, runs are equal."""
    ffn, model, optim = (config.get(name) for name in ("ffn", "model", "optim"))
    if isinstance(optim, dict) and "warmup_steps" in optim:
        config = {**config, "optim": {name: optim[name] for name in optim if name != "warmup_share"}}
    if not (isinstance(ffn, dict) and "kind" in ffn) or is_gone(ffn):
        return config
    layers = model.get("layers", "") if isinstance(model, dict) else ""
    return {**config, "ffn": keys_in_force(ffn, str(layers))}


def differing_keys(old: dict, new: dict) -> dict[str, tuple]:
    """{key: (old value, new value)} of two recorded configs; a missing value is None.

    Keys that nothing reads do not count.
    """
    old, new = flat(_in_force(old)), flat(_in_force(new))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
