"""Arrays of old models that no layer reads any more: selection biases of mixtures that balanced no load.

Until `config_version` 5 every mixture had one, and added it to what its choice went by. A leaf layer has one
where it balances its load; one that never moved can be left out.
"""

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.upgrades import LAST_OF_MANY


def unread(saved: Mapping[str, Any], wanted: Container[str]) -> dict[str, Any]:
    """Those of `saved`, arrays by their paths, that old mixtures had and the model that is wanted has not.

    Example:
      >>> unread({"run_0/ffn/w_in": 1, "run_0/ffn/selection_bias": 2}, ["run_0/ffn/w_in"])
      {'run_0/ffn/selection_bias': 2}
    """
    return {
        name: leaf
        for name, leaf in saved.items()
        if name not in wanted and name.split("/")[-1] == "selection_bias"
    }


def check_unmoved(biases: Mapping[str, Any], where: str, field: str) -> None:
    """Raises InputError, which begins with `field`, if a layer would choose otherwise without its bias.

    Args:
      biases: arrays by their paths, of `unread`.
      where: the file or directory that they come from.
      field: the first word of the error's sentence.
    """
    for name, bias in biases.items():
        if np.any(np.asarray(bias)):
            raise InputError(
                f"{field}: {name} of {where!r} is not 0 and moves the choice of a layer that balances no "
                f"load; no layer has that any more; the last commit that reads it is {LAST_OF_MANY}."
            )
