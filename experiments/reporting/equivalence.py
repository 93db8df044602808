"""Whether two layers are level: differences paired by seed, and two one-sided tests against a margin.

That a difference is not significant does not show that there is none: too few seeds look the same. Two
one-sided t tests (TOST; Schuirmann 1987) show it: one against a mean of -margin or less, one against +margin
or more. Both reject at 5 % exactly where the 90 % interval of the mean lies within the margin.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy import special

from experiments.reporting.aggregate import COMMON, by_seed, check_same, paired
from tree_ffn.errors import InputError, check_number

# Nats a token; fixed on 2026-11-30, when no leaf layer had more than one seed.
MARGIN = 0.01
LEVEL = 0.05


class Equivalence(NamedTuple):
    """What paired differences say.

    Attributes:
      n: pairs.
      mean: of the differences.
      low, high: ends of its 90 % interval (`1 - 2 LEVEL`).
      p_level: of two one-sided tests: below `LEVEL` the mean is within the margin.
      p_differs: of a two-sided t test: below `LEVEL` the mean is not 0.
    """

    n: int
    mean: float
    low: float
    high: float
    p_level: float
    p_differs: float


def tost(differences: Sequence[float], margin: float = MARGIN) -> Equivalence:
    """Two one-sided tests of the mean of paired differences d against -margin and +margin.

        s = sd(d) / sqrt(n);   t- = (mean d + margin) / s,   t+ = (mean d - margin) / s
        p_level = max(P(T > t-), P(T < t+)),   T Student's of n - 1 degrees of freedom

    Args:
      differences: one a seed, of at least two seeds.
      margin: how far apart two layers may be and be called level.

    Raises:
      InputError: there are fewer than two differences, one is no finite number, or the margin is not above 0.

    Example:
      >>> said = tost([0.001, -0.002, 0.003], margin=0.01)
      >>> said.n, round(said.p_level, 3), round(said.p_differs, 3)
      (3, 0.012, 0.691)
    """
    check_number("margin", margin, above=0)
    for value in differences:
        check_number("differences", value)
    n = len(differences)
    if n < 2:
        raise InputError(f"differences: {n} is too few; use those of at least 2 seeds.")
    mean, s = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    if s == 0:  # all are alike: what the tests tend to
        return Equivalence(n, mean, mean, mean, float(abs(mean) >= margin), float(mean == 0))
    below = lambda t: float(special.stdtr(n - 1, t))
    half = float(special.stdtrit(n - 1, 1 - LEVEL)) * s
    p_level = max(below(-(mean + margin) / s), below((mean - margin) / s))
    return Equivalence(n, mean, mean - half, mean + half, p_level, 2 * below(-abs(mean) / s))


def differences(rows: list[dict], one: str, other: str, metric: str = "val_loss") -> dict[int, float]:
    """{seed: `one` - `other`} of the seeds that both lines have.

    Args:
      rows: of results files, as `load_results` reads them.
      one, other: names of rows.
      metric: of the rows.

    Raises:
      InputError: a line has no such rows, or has several configs, or both cannot be compared.
    """
    lines = [[row for row in rows if row["row"] == name and row["metric"] == metric] for name in (one, other)]
    for name, line in zip((one, other), lines):
        if not line:
            raise InputError(f"row: {name!r} has no {metric} in these results; use one that has.")
    for name, line in zip((one, other), lines):
        check_same(name, line)
    check_same(f"{one} and {other}", lines[0] + lines[1], COMMON)
    x, y = (by_seed(line, metric) for line in lines)
    seeds = sorted(x.keys() & y.keys())
    return dict(zip(seeds, paired(lambda a, b: a - b, {seed: x[seed] for seed in seeds}, y)))


def table(
    rows: list[dict], pairs: Iterable[tuple[str, str]], metric: str = "val_loss", margin: float = MARGIN
) -> str:
    """A Markdown table with a line a pair of rows; of fewer than two common seeds it has no test.

    Args:
      rows: of any table.
      pairs: names of the two rows that each line compares.
      metric: of which.
      margin: differences within it count as none.
    """
    lines = [
        f"| row | less row | seeds | mean | 90 % interval | p, within {margin:g} | p, differ |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one, other in pairs:
        found = list(differences(rows, one, other, metric).values())
        cells = [f"`{one}`", f"`{other}`", str(len(found)), *judged(found, margin)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def judged(found: Sequence[float], margin: float) -> list[str]:
    """Mean, interval and both p of a line, as they are written."""
    if len(found) < 2:
        return [f"{value:+.4f}" for value in found] + [""] * (4 - len(found))
    said = tost(found, margin)
    return [
        f"{said.mean:+.4f}",
        f"{said.low:+.4f} to {said.high:+.4f}",
        f"{said.p_level:.3f}",
        f"{said.p_differs:.3f}",
    ]
