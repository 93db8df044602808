"""Layers fitted to the output y of the dense layer that they come from: what units add, and who visits them.

With h[t, i] = gate[t, i] act(z[t, i]) of place i (see `targets`), and w0 what w_out was:

    w_out, b_out    min sum_t ||y[t] - b_out - sum_i h[t, i] w_out[i]||^2
                        + PRIOR sum_i mean over its visits(h[., i]^2) ||w_out[i] - w0[i]||^2

so visited units add what others would have added, as far as it goes with what they add themselves, and those
that few tokens visit stay what they were. Routers are fitted (see `fit_routers`) to the error that each
expert takes away, with d the part of y that b_out and the token's other experts leave:

    value[j, t] = ||d[t]||^2 - ||d[t] - y_j[t]||^2,   y_j = sum_{i of expert j} gate act(z[t, i]) w_out[i]

where the gate is that of chosen experts, in the mean of squares.
"""

import numpy as np

from tree_ffn.conversion.targets import Target, joined, output, place_gates, place_outputs, routed

# In visits: how much the w_out that was there counts.
PRIOR = 32.0


def refit(target: Target, params: dict, x_TE: np.ndarray, y_TE: np.ndarray, times: int) -> dict:
    """The layer with w_out and b_out solved for `times` times, and routers fitted anew between.

    It ends where that no longer lowers the error on these tokens, so more times never raise it.

    Args:
      target: the layer.
      params: its arrays, float32, as `init_ffn` names them.
      x_TE: inputs of the calibration tokens.
      y_TE: the dense layer's outputs.
      times: 0 changes nothing.

    Returns:
      new params; w_in and b_in are as they were but for first units that are routers.
    """
    error = np.inf
    for time in range(times):
        tried = params
        for group in range(len(target.groups) if time else 0):
            tried = target.fitted(tried, x_TE, values(target, tried, x_TE, y_TE, group), group)
        h_TI = place_outputs(tried, target.spec, x_TE)
        h_TI *= place_gates(tried, target.spec, *routed(tried, target.spec, x_TE))
        w_IE, b_E = solve_outputs(h_TI, y_TE, joined(tried, "w_out"))
        tried = tried | {"w_out": w_IE.reshape(params["w_out"].shape), "b_out": b_E}
        before, error = error, squared(y_TE - output(tried, target.spec, x_TE))
        if not error < before:
            break
        params = tried
    return params


def squared(error_TE: np.ndarray) -> float:
    """Sum of squares, in float64."""
    return float(np.square(error_TE, dtype=np.float64).sum())


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


def values(target: Target, params: dict, x_TE: np.ndarray, y_TE: np.ndarray, group: int) -> np.ndarray:
    """How much error each expert of a group takes away while a token's others have theirs: float32 [J, T].

    Args:
      target: the layer to make.
      params: its arrays so far.
      x_TE: inputs on the calibration text.
      y_TE: the dense layer's outputs for them.
      group: which of `target.groups`.
    """
    spec, w_IE, experts = target.spec, joined(params, "w_out"), target.experts[target.groups[group]]
    ids_TK, gates_TK = routed(params, spec, x_TE)
    h_TI, gate_TI = place_outputs(params, spec, x_TE), place_gates(params, spec, ids_TK, gates_TK)
    there_TI, size = h_TI * gate_TI, size_of(gates_TK)
    d_TE = y_TE - params["b_out"] - there_TI @ w_IE
    if target.one_each:  # another one takes the place of the chosen one
        own = np.unique(experts)
        return expert_values(size * h_TI, w_IE, d_TE + there_TI[:, own] @ w_IE[own], experts)
    return expert_values(size * h_TI, w_IE, d_TE, experts, gate_TI[:, experts[:, 0]] / size)


def size_of(gates_TK: np.ndarray) -> np.float32:
    """Root mean square of the gates of chosen experts: what one more would count."""
    return np.float32(np.sqrt(np.square(gates_TK, dtype=np.float64).mean()))


def expert_values(
    h_TI: np.ndarray,
    w_IE: np.ndarray,
    d_TE: np.ndarray,
    experts: np.ndarray,
    back_TJ: np.ndarray | None = None,
) -> np.ndarray:
    """||d||^2 - ||d - y_j||^2 of experts that add y_j = sum_i h[t, i] w[i] over their places: float32 [J, T].

    Args:
      h_TI: outputs of all places.
      w_IE: their rows of w_out.
      d_TE: what is left to add.
      experts: places of each, int [J, n].
      back_TJ: how many times y_j is in what is there already, from which it is taken out first; None: 0.
    """
    along_TI = d_TE @ w_IE.T
    found = np.empty((len(experts), len(h_TI)), np.float32)
    for expert, places in enumerate(experts):
        h_Tn, w_nE = h_TI[:, places], w_IE[places]
        square_T = ((h_Tn @ (w_nE @ w_nE.T)) * h_Tn).sum(axis=1)
        left_T = (h_Tn * along_TI[:, places]).sum(axis=1)
        if back_TJ is not None:
            left_T += back_TJ[:, expert] * square_T
        found[expert] = 2 * left_T - square_T
    return found


def best_experts(target: Target, params: dict, x_TE: np.ndarray, y_TE: np.ndarray) -> np.ndarray:
    """The experts that a router who knew y would choose, one after the other: int [T, K].

    From the layer's own on, each in turn gives way to the best one given the others.

    Args:
      target: the layer to make.
      params: its arrays.
      x_TE: inputs on the calibration text.
      y_TE: the dense layer's outputs for them.
    """
    spec, w_IE = target.spec, joined(params, "w_out")
    ids_TK, gates_TK = routed(params, spec, x_TE)
    ids_TK, size = ids_TK.copy(), size_of(gates_TK)
    h_TI = place_outputs(params, spec, x_TE) * size
    for slot in range(ids_TK.shape[1]):
        others_TK = np.ones(ids_TK.shape, np.float32)
        others_TK[:, slot] = 0
        d_TE = y_TE - params["b_out"] - (h_TI * place_gates(params, spec, ids_TK, others_TK)) @ w_IE
        group = target.groups[slot % len(target.groups)]
        value_JT = expert_values(h_TI, w_IE, d_TE, target.experts[group])
        if not target.one_each:  # not one that the token has already
            np.put_along_axis(value_JT, np.delete(ids_TK, slot, axis=1).T, -np.inf, axis=0)
        ids_TK[:, slot] = group.start + value_JT.argmax(axis=0)
    return ids_TK


def output_at(target: Target, params: dict, x_TE: np.ndarray, ids_TK: np.ndarray) -> np.ndarray:
    """What the layer adds up to for given experts, whatever its routers say: [T, E].

    Args:
      target: the layer to make.
      params: its arrays.
      x_TE: inputs.
      ids_TK: int, the experts of every token.
    """
    size = size_of(routed(params, target.spec, x_TE)[1])
    gate_TI = place_gates(params, target.spec, ids_TK, np.full(ids_TK.shape, size))
    h_TI = place_outputs(params, target.spec, x_TE) * gate_TI
    return h_TI @ joined(params, "w_out") + params["b_out"]
