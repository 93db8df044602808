"""What config files share: a ConfigDict of all knobs, and the grammar of their argument."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tree_ffn.config import FINETUNE, SECTIONS, first_values, knobs


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """Reads the text after the colon of `--config=configs/x.py:key=value,...`, strictly.

    Args:
      arg: `key=value` pairs, comma separated; None or "" gives the defaults.
      **defaults: the known keys; a value is read as the type of its default.

    Returns:
      a ConfigDict of `defaults` with what `arg` says.

    Raises:
      ValueError: one sentence: an unknown or repeated key, or a value of another type.

    Example:
      >>> parse_arg("steps=10,kind=dense", steps=5, kind="tree", remat=False).to_dict()
      {'kind': 'dense', 'remat': False, 'steps': 10}
    """
    values, seen = dict(defaults), set()
    for item in arg.split(",") if arg else ():
        key, equals, text = item.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(f"{name}={default}" for name, default in defaults.items())
            raise ValueError(f"config argument: {item!r} is not known; use key=value of: {known}.")
        if key in seen:
            raise ValueError(f"config argument: {key!r} is given twice; give it once.")
        seen.add(key)
        values[key] = _read(key, text, type(defaults[key]))
    return ConfigDict(values)


def _read(key, text, kind):
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"config argument: {key}={text} is not allowed; use true or false.")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        allowed = f"use a value of type {kind.__name__}"
        raise ValueError(f"config argument: {key}={text} is not allowed; {allowed}.") from None


def check_known(arg: ConfigDict, **known: dict[str, Any] | tuple[str, ...]) -> None:
    """Refuses a name in a config's argument that is none of those it may be.

    Args:
      arg: as `parse_arg` reads it.
      **known: the names that a key may have.

    Raises:
      ValueError: one sentence with the key, its value and the names.

    Example:
      >>> check_known(parse_arg("row=moe", row="dense"), row=("dense", "moe"))
    """
    for key, names in known.items():
        if arg[key] not in names:
            raise ValueError(
                f"config argument: {key}={arg[key]} is not known; use one of: {', '.join(names)}."
            )


def base_config() -> ConfigDict:
    """Every knob with its first value (see `tree_ffn.config`); a config file changes what it is about."""
    return _config_dict(SECTIONS)


def finetune_section() -> ConfigDict:
    """Section `finetune`."""
    return _config_dict(FINETUNE).finetune


def _config_dict(sections) -> ConfigDict:
    """What is left open has a type, so that a command line can set it."""
    config = ConfigDict(first_values(sections))
    for key, knob in knobs(sections).items():
        if knob.first is None:
            section, _, name = key.rpartition(".")
            config[section][name] = placeholder(knob.type)
    return config
