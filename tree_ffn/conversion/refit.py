"""Trees fitted to the output y of the dense layer that they come from: what units add, and who visits them.

With h[t, i] = act(z[t, i]) where token t visits place i of I = P U, 0 elsewhere, and w0 what w_out was:

    w_out, b_out    min sum_t ||y[t] - b_out - sum_i h[t, i] w_out[i]||^2
                        + PRIOR sum_i mean over its visits(h[., i]^2) ||w_out[i] - w0[i]||^2

so visited units add what others would have added, as far as it goes with what they add themselves, and those
that few tokens visit stay what they were. Routers of tree p are fitted (see `routers`) to the error that
each of its paths takes away, with d the part of y that b_out and the other trees leave:

    value[j, t] = ||d[t]||^2 - ||d[t] - y_j[t]||^2,   y_j = sum_{i on path j} h[t, i] w_out[i]
"""

import functools

import jax
import numpy as np

from tree_ffn.conversion.fit_routers import fit_tree, path_units, put_routers
from tree_ffn.tree import TreeShape, TreeSpec, activation, tree_ffn

# In visits: how much the w_out that was there counts.
PRIOR = 8.0


def refit(params: dict, spec: TreeSpec, x_TE: np.ndarray, y_TE: np.ndarray, times: int) -> dict:
    """The layer with w_out and b_out solved for `times` times, and routers fitted anew between.

    Args:
      params: arrays of the layer, float32, as `tree.init_params` names them.
      spec: of the layer.
      x_TE: inputs of the calibration tokens.
      y_TE: the dense layer's outputs.
      times: 0 changes nothing.

    Returns:
      new params; w_in and b_in are as they were but for first units that are routers.
    """
    for time in range(times):
        if time:
            params = _refit_routers(params, spec, x_TE, y_TE)
        _, leaf_TP = run_trees(params, spec, x_TE)
        h_TI = place_outputs(params, spec, x_TE) * visited(leaf_TP, spec.shape)
        w_IE, b_E = solve_outputs(h_TI, y_TE, _joined(params, "w_out"))
        params = params | {"w_out": w_IE.reshape(params["w_out"].shape), "b_out": b_E}
    return params


def solve_outputs(h_TI: np.ndarray, y_TE: np.ndarray, w0_IE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w_out [I, E] and b_out [E] of the problem in the head of this file, float32.

    Args:
      h_TI: what the places do; 0 where they are not visited.
      y_TE: what to add up to.
      w0_IE: w_out before.
    """
    mean_I, mean_E = h_TI.mean(axis=0), y_TE.mean(axis=0)
    centred_TI = h_TI - mean_I
    moment_II = (centred_TI.T @ centred_TI).astype(np.float64)
    missed_TE = y_TE - mean_E - centred_TI @ w0_IE
    prior_I = PRIOR * np.square(h_TI).sum(axis=0) / np.maximum((h_TI != 0).sum(axis=0), 1)
    moment_II[np.diag_indices_from(moment_II)] += prior_I + 1e-9 * moment_II.trace() / len(moment_II) + 1e-30
    w_IE = w0_IE + np.linalg.solve(moment_II, (centred_TI.T @ missed_TE).astype(np.float64))
    return w_IE.astype(np.float32), (mean_E - mean_I @ w_IE).astype(np.float32)


def leaf_values(params: dict, spec: TreeSpec, x_TE, y_TE, leaf_TP: np.ndarray, tree: int) -> np.ndarray:
    """How much error each path of a tree takes away while the other trees have theirs: float32 [J, T]."""
    h_TI, w_IE = place_outputs(params, spec, x_TE), _joined(params, "w_out")
    own, units = _places(spec.shape, tree), path_units(spec.shape)
    others_TI = h_TI * visited(leaf_TP, spec.shape)
    others_TI[:, own] = 0
    d_TE = y_TE - params["b_out"] - others_TI @ w_IE
    h_TU, w_UE = h_TI[:, own], w_IE[own]
    single_TU = 2 * h_TU * (d_TE @ w_UE.T)
    gram_UU = w_UE @ w_UE.T
    values = np.empty((len(units), len(x_TE)), np.float32)
    for leaf, path in enumerate(units):
        h_Tu = h_TU[:, path]
        pairs_T = ((h_Tu @ gram_UU[np.ix_(path, path)]) * h_Tu).sum(axis=1)
        values[leaf] = single_TU[:, path].sum(axis=1) - pairs_T
    return values


def best_leaves(params: dict, spec: TreeSpec, x_TE: np.ndarray, y_TE: np.ndarray) -> np.ndarray:
    """The leaves that a router who knew y would choose, a tree after the other: int [T, P]."""
    leaf_TP = run_trees(params, spec, x_TE)[1].copy()
    for tree in range(spec.shape.n_trees):
        leaf_TP[:, tree] = leaf_values(params, spec, x_TE, y_TE, leaf_TP, tree).argmax(axis=0)
    return leaf_TP


def output_at(params: dict, spec: TreeSpec, x_TE: np.ndarray, leaf_TP: np.ndarray) -> np.ndarray:
    """What the layer adds up to for given leaves, whatever its routers say: [T, E]."""
    h_TI = place_outputs(params, spec, x_TE) * visited(leaf_TP, spec.shape)
    return h_TI @ _joined(params, "w_out") + params["b_out"]


def place_outputs(params: dict, spec: TreeSpec, x_TE: np.ndarray) -> np.ndarray:
    """act(z) of every place, visited or not: float32 [T, I]."""
    z_TI = x_TE @ _joined(params, "w_in").T + _joined(params, "b_in")
    return np.array(activation(spec.activation)(z_TI))


def visited(leaf_TP: np.ndarray, shape: TreeShape) -> np.ndarray:
    """bool [T, I]: the places that tokens with these leaves visit."""
    on_path_JU = np.zeros((shape.n_leaves, shape.tree_units), bool)
    np.put_along_axis(on_path_JU, path_units(shape), True, axis=1)
    return on_path_JU[leaf_TP].reshape(len(leaf_TP), -1)


def run_trees(params: dict, spec: TreeSpec, x_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, E] and leaves [T, P], as the layer itself has them."""
    y_TE, leaf_TP = _run_trees(params, x_TE, spec)
    return np.asarray(y_TE), np.asarray(leaf_TP)


@functools.partial(jax.jit, static_argnames=("spec",))
def _run_trees(params: dict, x_TE, spec: TreeSpec):
    y_TE, info = tree_ffn(params, x_TE, spec)
    return y_TE, info.leaf_TP


def _refit_routers(params: dict, spec: TreeSpec, x_TE, y_TE) -> dict:
    """Every tree's routers in turn, by the errors with the routers that the others have by then."""
    if not spec.shape.depth:
        return params
    for tree in range(spec.shape.n_trees):
        _, leaf_TP = run_trees(params, spec, x_TE)
        values_JT = leaf_values(params, spec, x_TE, y_TE, leaf_TP, tree)
        params = put_routers(params, spec, *fit_tree(x_TE, values_JT, spec.shape), tree)
    return params


def _places(shape: TreeShape, tree: int) -> slice:
    """The places of a tree among all."""
    return slice(tree * shape.tree_units, (tree + 1) * shape.tree_units)


def _joined(params: dict, name: str) -> np.ndarray:
    """w_in, b_in or w_out of all places: [I, ...]."""
    return params[name].reshape(-1, *params[name].shape[2:])
