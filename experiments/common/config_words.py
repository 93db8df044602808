"""Configs as words of a command line, and back: what a sweep runs is what experiments.train would read."""

import functools
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tree_ffn.config import first_values, unknown
from tree_ffn.data import corpus_spec_from_config, load_tokenizer
from tree_ffn.errors import InputError
from tree_ffn.models.from_config import check_set, model_spec_from_config
from tree_ffn.plain import flat, plain
from tree_ffn.training.plan import check_trainable, optim_spec, train_spec
from tree_ffn.upgrades import REMOVED


def check_config(config) -> None:
    """Raises InputError unless a run of `config` could start; reads no text and looks at no device.

    Model and text of fine-tuning are not looked at where they are those of its start.
    """
    model = None
    if config.data.corpus != "start":
        model = model_spec_from_config(config, _vocab_size(config.data.tokenizer))
    train_spec(config)
    optim = optim_spec(config)
    if model is None:
        return
    check_trainable(model, optim)
    corpus_spec_from_config(config)


@functools.cache
def _vocab_size(tokenizer: str) -> int:
    return load_tokenizer(tokenizer).vocab_size


def words_of(file: str, values: dict[str, Any]) -> list[str]:
    """The part of a command line of experiments.train that says the config.

    Example:
      >>> words_of("configs/smoke.py", {"kind": "tree", "optim.lr": 1e-3, "ffn.node_width": (1, 2)})
      ['--config=configs/smoke.py:kind=tree', '--config.optim.lr=0.001', '--config.ffn.node_width=(1,2)']
    """
    argument = ",".join(f"{key}={written(value)}" for key, value in values.items() if "." not in key)
    first = f"--config={file}:{argument}" if argument else f"--config={file}"
    return [first, *(f"--config.{key}={written(value)}" for key, value in values.items() if "." in key)]


def written(value) -> str:
    """A value as a flag takes it; without spaces, so that a recorded command stays one word a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return repr(tuple(value)).replace(" ", "")
    return str(value)


def config_of(words: list[str], flag: str = "config") -> ConfigDict:
    """The config that experiments.train would read from these words of a command line.

    Args:
      words: of the config, e.g. as `words_of` makes them.
      flag: what they call it.

    Raises:
      InputError: in the words of ml_collections, or of the config file.
    """
    try:
        return _read(words, flag)
    except InputError:
        raise
    except Exception as error:  # a file, its argument, a key or a value: absl wraps them in many ways
        said = unknown_key(words, flag) or f"{' '.join(words[:1])}: {last_line(error)}"
        raise InputError(said) from error


def _read(words: list[str], flag: str) -> ConfigDict:
    own = flags.FlagValues()
    config_flags.DEFINE_config_file(flag, flag_values=own, lock_config=True, sys_argv=list(words))
    own(["train", *words])
    check_words(own[flag])
    config: Any = own[flag].value
    return config.copy_and_resolve_references()


def check_words(flag) -> None:
    """Raises InputError if the command line sets a key of a config that does nothing.

    Args:
      flag: of a config, as absl's FlagValues have it; one that names no file is not looked at.
    """
    config: Any = flag.value
    if config is None or "ffn" not in config:
        return
    changed = config_flags.get_override_values(flag)
    if "finetune" in config and (of_layers := [key for key in changed if key.startswith("ffn.")]):
        raise InputError(
            f"{of_layers[0]}: does nothing in fine-tuning, which goes on with the layers of its start; leave "
            "it out."
        )
    check_set(changed, config)


def unknown_key(words: list[str], flag: str = "config") -> str | None:
    """One sentence on the first word that sets a key which the config does not have; None if each has one.

    Example:
      >>> unknown_key(["--config=configs/smoke.py", "--config.optim.learning_rate=1"])
      '--config.optim.learning_rate is no key of the config; the nearest is optim.lr.'
    """
    file = re.search(rf"(?:^|\n)--?{flag}[=\n]([^\n]*)", "\n".join(words))
    try:
        known = flat(plain(_read([f"--{flag}={file[1]}"], flag)) if file else first_values())
    except Exception:  # then what is wrong is the file
        return None
    for word in words:
        said = re.match(rf"--?(?:no)?{flag}\.([^=\[]+)", word)
        if said and not any(f"{key}.".startswith(f"{said[1]}.") for key in known):
            if said[1] in REMOVED:
                return f"--{flag}.{said[1]} is gone; the last commit that has it is {REMOVED[said[1]]}."
            return f"--{flag}.{unknown(said[1], known)}"
    return None


def last_line(error: Exception) -> str:
    """What an error says at its end; ml_collections shows a whole traceback before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return line.removeprefix("ValueError: ")
