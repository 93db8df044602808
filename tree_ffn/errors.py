"""The one exception that means: the input is wrong, not the program."""

import math
import numbers
from typing import Any


class InputError(ValueError):
    """A value from outside (config, flag, file, argument) that cannot be used.

    The message is one sentence that names the field, the value and what is
    allowed. Programs under `experiments/` print it and exit with code 2.
    """


class NotFinite(InputError):
    """A model's numbers are NaN or infinite where an answer needs them."""


def not_finite(what: str) -> NotFinite:
    """The one sentence for what a model cannot answer; `what` names the token, the text or the batch."""
    return NotFinite(
        f"{what}: the model's scores are NaN or infinite, as its weights are too large or damaged; use "
        "another checkpoint, or float32 where it is kept or computed in 16 bits."
    )


def check_metric(what: str, value: float) -> None:
    """Raises NotFinite unless a metric of a model, such as a loss, is a finite number.

    Example:
      >>> check_metric("loss", 2.5)
    """
    if not math.isfinite(value):
        raise not_finite(what)


def check_choice(field: str, value: object, allowed) -> None:
    """Raises InputError unless `value` is one of `allowed`.

    Args:
      field: names it in the error.
      value: what was given.
      allowed: the values to choose from.

    Example:
      >>> check_choice("gate", "max", ("min", "product"))
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: gate: 'max' is not known; use one of: min, product.
    """
    if value not in allowed:
        names = ", ".join(str(name) for name in allowed)
        raise InputError(f"{field}: {value!r} is not known; use one of: {names}.")


def check_positive_int(field: str, value: object, *, least: int = 1) -> None:
    """Raises InputError unless `value` is a whole number, also one of NumPy, of at least `least`.

    Args:
      field: names it in the error.
      value: what was given.
      least: the smallest that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{field}: {value!r} is not allowed; use a whole number of at least {least}.")


def is_whole_number(text: str) -> bool:
    """Whether a text is a number from 0 as people write it, of at most 18 digits: `int` refuses thousands.

    Example:
      >>> is_whole_number("12"), is_whole_number("-1"), is_whole_number("9" * 5000)
      (True, False, False)
    """
    return text.isascii() and text.isdecimal() and len(text) <= 18


def check_number(field: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    """Raises InputError unless `value` is a finite number, of at least `least`, or above `above`.

    Args:
      field: names it in the error.
      value: what was given.
      least: the smallest that is allowed; None: no bound.
      above: what it must exceed; None: no bound.
    """
    real = issubclass(type(value), numbers.Real) and not isinstance(value, bool)  # numbers of NumPy too
    if (
        real
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
    ):
        return
    rule = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    raise InputError(f"{field}: {value!r} is not allowed; use a number{rule}.")


def check_not_pointer(where: str, beginning: bytes) -> None:
    """Raises InputError where a file is what git-lfs leaves in its place until it is fetched.

    Example:
      >>> check_not_pointer("a.json", b"version https://git-lfs.github.com/spec/v1")
      Traceback (most recent call last):
      ...
      tree_ffn.errors.InputError: a.json is a pointer of git-lfs, not the file; fetch it with: git lfs pull.
    """
    if beginning.startswith(b"version https://git-lfs"):
        raise InputError(f"{where} is a pointer of git-lfs, not the file; fetch it with: git lfs pull.")


def reason(error: BaseException) -> str:
    """What another library's exception says, short enough to stand inside a sentence.

    Example:
      >>> reason(RuntimeError("the file is cut off.\\nat byte 7"))
      'the file is cut off'
      >>> reason(FileNotFoundError(2, "No such file or directory", "a.json"))
      'No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror:  # its str repeats the number and the path
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
