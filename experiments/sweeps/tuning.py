"""How a learning rate is chosen: a small grid for every kind, longer where the best stands at its edge."""

import math
from typing import NamedTuple

from tree_ffn.errors import InputError, check_positive_int

FACTOR = 2.0


class Grid(NamedTuple):
    """What each kind tries.

    Attributes:
      key: of the config, e.g. `optim.lr`.
      values: ascending; each kind tries all of them.
      extensions: at most so many values beyond them, each `FACTOR` times the last.
    """

    key: str
    values: tuple[float, ...]
    extensions: int

    @classmethod
    def of(cls, tuning: dict) -> "Grid":
        """The grid that the `tuning` of a sweep describes.

        Raises:
          InputError: names the field and what is allowed.
        """
        values, extensions = tuning.get("values", ()), tuning.get("extensions", 2)
        is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
        good = lambda value: is_number(value) and math.isfinite(value) and value > 0
        if not isinstance(values, list | tuple) or not all(map(good, values)) or len(set(values)) < 3:
            raise InputError(
                f"sweep tuning: values {values!r} is not allowed; use at least 3 positive numbers, so that "
                "the best can have a neighbour on each side."
            )
        check_positive_int("sweep tuning: extensions", extensions, least=0)
        return cls(tuning.get("key", "optim.lr"), tuple(sorted(set(values))), extensions)


def next_values(losses: dict[float, float], grid: Grid) -> list[float]:
    """The values that have to be tried next; empty when the choice is made.

    First all of the grid; then, as long as the best value is the smallest or the largest tried, one
    beyond it, `grid.extensions` times at most.

    Args:
      losses: {value: validation loss}, inf where the run diverged.
      grid: the values that every kind tries.

    Example:
      >>> grid = Grid("optim.lr", (1e-3, 2e-3, 4e-3), extensions=2)
      >>> next_values({1e-3: 2.0}, grid)
      [0.002, 0.004]
      >>> next_values({1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.8}, grid)
      [0.008]
      >>> next_values({1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.8, 8e-3: 1.95}, grid)
      []
    """
    missing = [value for value in grid.values if value not in losses]
    if missing:
        return missing
    best, tried = best_value(losses), sorted(losses)
    if len(tried) - len(grid.values) >= grid.extensions:
        return []
    if best == tried[0]:
        return [_rounded(best / FACTOR)]
    return [_rounded(best * FACTOR)] if best == tried[-1] else []


def best_value(losses: dict[float, float]) -> float:
    """The value of the lowest loss; the smaller of two equal ones.

    Example:
      >>> best_value({2e-3: 1.5, 1e-3: 1.5, 4e-3: float("inf")})
      0.001
    """
    return min(sorted(losses), key=lambda value: losses[value])


def at_edge(losses: dict[float, float]) -> bool:
    """Whether nothing was tried on one side of the best value."""
    return best_value(losses) in (min(losses), max(losses))


def _rounded(value: float) -> float:
    """0.006, not 0.006000000000000001: it is written into command lines."""
    return float(f"{value:.6g}")
