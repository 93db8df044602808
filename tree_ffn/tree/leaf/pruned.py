"""Pruned leaf layers: which arrays they have, and how they are made from full ones.

Of the X experts of a layer `LeafSpec.n_kept` are left. Experts keep their numbers, and the router its rows:

    w_in [n_kept,W,E], b_in [n_kept,W], w_out [n_kept,W,E]   of the experts that are left, nothing else
    kept_row [X]    int32, where each expert stands in them; -1 where it is gone. No optimizer touches it

An expert that is gone is never chosen: the next best takes its place, and gates are normed over the chosen.
"""

import dataclasses

import jax
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.tree.leaf.spec import LeafSpec

UNITS = ("w_in", "b_in", "w_out")


def prune(params: dict, spec: LeafSpec, keep_X: np.ndarray) -> tuple[LeafSpec, dict]:
    """The same layer with the named experts, stored without the others.

    Tokens whose experts are all kept have the output that they had.

    Args:
      params: of a leaf layer, pruned already or not; NumPy arrays or jax's.
      spec: the layer.
      keep_X: bool [X], the experts to keep, at least K; of a pruned layer, experts that it still has.

    Returns:
      the spec and the arrays (NumPy) of the pruned layer.

    Raises:
      InputError: too few would be left, one is gone already, or the router is a hash, which has no next best.

    Example:
      >>> from tree_ffn.tree.leaf import LeafSpec, init_params
      >>> spec = LeafSpec(n_experts=4, expert_width=3, top_k=2)
      >>> params = init_params(jax.random.key(0), spec, width=8)
      >>> pruned_spec, pruned = prune(params, spec, np.array([True, False, True, True]))
      >>> pruned_spec.n_kept, pruned["w_in"].shape, pruned["kept_row"].tolist()
      (3, (3, 3, 8), [0, -1, 1, 2])
    """
    params = jax.tree.map(np.asarray, params)
    if keep_X.shape != (spec.n_experts,) or keep_X.dtype != bool:
        raise InputError(
            f"keep: {keep_X.dtype}{list(keep_X.shape)} is not allowed; use bool[{spec.n_experts}]."
        )
    if (keep_X & ~present_experts(params, spec)).any():
        raise InputError("keep: an expert that was pruned before is not allowed; keep those that are there.")
    if keep_X.sum() < spec.top_k:
        raise InputError(
            f"keep: {keep_X.sum()} experts are not enough; a token uses {spec.top_k}, so keep as many."
        )
    pruned_spec = dataclasses.replace(spec, n_kept=int(keep_X.sum()))
    rows = params["kept_row"][keep_X] if spec.n_kept else np.flatnonzero(keep_X)
    new = params | {name: params[name][rows] for name in UNITS}
    return pruned_spec, new | ({"kept_row": kept_row(keep_X)} if pruned_spec.n_kept else {})


def present_experts(params: dict, spec: LeafSpec) -> np.ndarray:
    """The experts that a layer has: bool [X]; all of them unless it was pruned."""
    return np.asarray(params["kept_row"]) >= 0 if spec.n_kept else np.ones(spec.n_experts, bool)


def kept_row(keep_X: np.ndarray) -> np.ndarray:
    """Where experts stand among those that are kept: int32 [X]; -1 where they are not.

    Example:
      >>> kept_row(np.array([True, False, True])).tolist()
      [0, -1, 1]
    """
    return np.where(keep_X, np.cumsum(keep_X) - 1, -1).astype(np.int32)
