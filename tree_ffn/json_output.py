"""JSON that others can read: NaN and Infinity, which Python writes and JSON does not know, are refused."""

import json
import math
import numbers
from typing import Any

from tree_ffn.errors import NotFinite


def json_text(value: Any, where: str, **options) -> str:
    """A value as JSON text.

    Args:
      value: of JSON's kinds, or with numbers of NumPy in it.
      where: what the error begins with: the file, or the answer.
      **options: of `json.dumps`.

    Raises:
      NotFinite: names the number that JSON does not know.

    Example:
      >>> json_text({"a": [1.5, None]}, "x.json")
      '{"a": [1.5, null]}'
      >>> json_text({"a": [1.5, math.nan]}, "x.json")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.NotFinite: x.json: a.1 is nan, which is no number of JSON; nothing was written.
    """
    try:
        return json.dumps(value, allow_nan=False, default=_plain, **options)
    except ValueError:
        found = _first_bad(value)
        if found is None:  # something else is wrong
            raise
    raise NotFinite(f"{where}: {found} is no number of JSON; nothing was written.")


def number_or_none(value: float | None) -> float | None:
    """None in place of NaN: of a metric that there is none of, such as the standard error of one question."""
    return None if value is None or math.isnan(value) else value


def _plain(value):
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def _first_bad(value, name: str = "value") -> str | None:
    """The first number that is not finite, with its place."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return None if math.isfinite(value) else f"{name} is {value}, which"
    value = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    parts = value.items() if isinstance(value, dict) else ()
    prefix = "" if name == "value" else f"{name}."
    return next(filter(None, (_first_bad(part, f"{prefix}{key}") for key, part in parts)), None)
