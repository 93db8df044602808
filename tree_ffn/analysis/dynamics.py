"""How the use of trees changes over a run: its usage files as arrays over time, and metrics of them.

Everything here is made from arrays that a run has kept (see training/usage_log.py), so a new metric needs no
training. S counts the validations; the other letters are those of the layer: P trees, J = 2^D leaves, N nodes
in heap order, U units of a tree, D deciding levels, L = D + 1.
"""

import json
import os
import zipfile
from typing import NamedTuple

import jax
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.training.usage_log import usage_files
from tree_ffn.tree import usage


class OverTime(NamedTuple):
    """One kind of array of one layer: the steps at which it was kept, int [S], and the arrays [S, ...]."""

    steps: np.ndarray
    values: np.ndarray


def read_lines(workdir: str, name: str) -> list[dict]:
    """The JSON lines of a run's file; a torn last line, of a run that was killed, is left out.

    Raises:
      InputError: there is no such file, or another line is no JSON object.
    """
    path = os.path.join(workdir, name)
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise InputError(
            f"workdir: {path} cannot be read ({error.strerror}); name a run's directory."
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line else []
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise InputError(f"workdir: {path}, line {number} is no JSON ({error}).") from error
    return found


def load_usage(workdir: str) -> dict[int, dict[tuple[str, str], OverTime]]:
    """{layer: {(split, name): arrays over time}} of a run; layers that do not route are not in it.

    Args:
      workdir: directory of the run.

    Raises:
      InputError: a file is damaged.

    Example:
      >>> load_usage("runs/tree")[0]["valid", "visits"].values.shape      # doctest: +SKIP
      (12, 2, 128)
    """
    kept: dict[int, dict[tuple[str, str], dict[int, np.ndarray]]] = {}
    for path, step, split in usage_files(workdir):
        try:
            with open(path, "rb") as opened, np.load(opened) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"workdir: {path} is damaged ({error}).") from error
        for key, array in arrays.items():
            first, name = key.split("/")
            for layer, values in enumerate(array, int(first)):
                kept.setdefault(layer, {}).setdefault((split, name), {})[step] = values
    over_time = lambda by_step: OverTime(
        np.array(sorted(by_step)), np.stack([by_step[s] for s in sorted(by_step)])
    )
    return {
        layer: {key: over_time(by_step) for key, by_step in arrays.items()}
        for layer, arrays in sorted(kept.items())
    }


def dead_leaves(visits_SPJ: np.ndarray) -> np.ndarray:
    """Share of leaves without a visit: [S]."""
    return _metric(visits_SPJ, "dead_leaves")


def leaf_entropy(visits_SPJ: np.ndarray) -> np.ndarray:
    """Entropy of visits over a tree's leaves in bits / D, mean over trees: [S]; 0 at D = 0."""
    return _metric(visits_SPJ, "leaf_entropy")


def _metric(visits_SPJ: np.ndarray, name: str) -> np.ndarray:
    """A metric of `tree.usage.metrics` at every time."""
    return np.asarray(jax.vmap(usage.metrics)(visits_SPJ)[name])


class Decisions(NamedTuple):
    """Decisions of every level over time, each [S, D], weighted by visits.

    Attributes:
      right: share that goes right.
      skew: sum |right - left| / sum (right + left) over the level's nodes.
      constant: share made at nodes that send every token the same way.
    """

    right: np.ndarray
    skew: np.ndarray
    constant: np.ndarray


def decisions(visits_SPJ: np.ndarray) -> Decisions:
    """How each level decides: see `Decisions`.

    Args:
      visits_SPJ: int [S, P, J] of leaves.
    """
    shares = []
    for below in usage.counts_by_level(visits_SPJ.astype(np.float64))[1:]:
        left, right = below[..., 0::2], below[..., 1::2]
        total = np.maximum((left + right).sum(axis=(1, 2)), 1)
        constant = np.where(np.minimum(left, right) == 0, left + right, 0)
        sums = right, np.abs(right - left), constant
        shares.append([values.sum(axis=(1, 2)) / total for values in sums])
    empty = np.zeros((3, 0, len(visits_SPJ)))
    return Decisions(*np.moveaxis(np.array(shares) if shares else empty.swapaxes(0, 1), 0, -1))


def gradient_by_side(gradient_SPN: np.ndarray) -> np.ndarray:
    """Norm of the gradient of each level's left and of its right children: [S, L, 2].

    sqrt(sum over trees and nodes of squares). The root is no child: its norm stands in both places.

    Args:
      gradient_SPN: norm of every node.
    """
    root, *below = usage.by_level(gradient_SPN.astype(np.float64) ** 2)
    sums = [np.stack([root.sum(axis=(1, 2))] * 2, axis=-1)]
    sums += [np.stack([level[..., side::2].sum(axis=(1, 2)) for side in (0, 1)], axis=-1) for level in below]
    return np.sqrt(np.stack(sums, axis=1))


def by_unit_level(values_SPU: np.ndarray, widths: tuple[int, ...]) -> list[np.ndarray]:
    """Values of units as one array [S, P, 2^l W_l] a level.

    Args:
      values_SPU: of a tree's units in (level, node, unit) order.
      widths: W of every level.
    """
    starts = np.cumsum([0, *(2**level * width for level, width in enumerate(widths))])
    return [values_SPU[..., start:end] for start, end in zip(starts, starts[1:])]


def ever_working(peak_SPU: np.ndarray, eps: float) -> np.ndarray:
    """Share of units whose activation was above eps for some token: [S]."""
    return (peak_SPU > eps).mean(axis=(1, 2))


def moves(layer: dict[tuple[str, str], OverTime], per: int = 100) -> OverTime:
    """Share of tokens that change leaf within `per` steps, mean over trees: [S].

    From the share between two validations, which may be of any distance; it is not more than 1:

        rate = 1 - (1 - moved)^(per / distance)

    Args:
      layer: of `load_usage`.
      per: steps.
    """
    steps, moved = layer["valid", "moved"]
    validations = layer["valid", "visits"].steps
    before = validations[np.searchsorted(validations, steps) - 1]
    share = moved[:, :, -1].mean(axis=1)
    return OverTime(steps, 1 - (1 - share) ** (per / (steps - before)))


def freeze_step(layer: dict[tuple[str, str], OverTime], limit: float = 0.05, per: int = 100) -> int | None:
    """The first validation from which on fewer than `limit` of the tokens change leaf within `per` steps.

    None where that is not so even at the end. The rate of learning falls towards the end of a run, and
    moves with it: compare runs of one schedule.

    Args:
      layer: of `load_usage`.
      limit: share of tokens, mean over trees.
      per: steps.
    """
    steps, rate = moves(layer, per)
    (lively,) = np.nonzero(rate >= limit)
    first = lively[-1] + 1 if len(lively) else 0
    return int(steps[first]) if first < len(steps) else None
