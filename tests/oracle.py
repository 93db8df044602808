"""The path layer in float64 NumPy, forward and backward, written from its definition alone.

It shares nothing with `tree_ffn.tree` but the fields of a TreeSpec: plain loops over tokens, trees and
levels, every derivative by hand. What the implementations compute is compared with this.

    z[p,n,u] = <w_in[p,n,u], x> + b_in[p,n,u]          r[p,n] = z[p,n,0] - threshold[p,n]
    n_0 = 0;  n_{l+1} = 2 n_l + 1 + [r[p,n_l] > 0]     (ties and NaN go left; where pruned, to what is there)
    y = b_out + sum_p sum_l sum_u act(z[p,n_l,u]) w_out[p,n_l,u]     or at site `sum` b_out + act(sum z w_out)
    straight_through: dL/dr[n] += s'(r[n]) <dL/dsum, V(right) - V(left)> at visited nodes, V the sum of the
    path from a child on
"""

import math
from typing import NamedTuple

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z):
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))


def _gelu(z):
    cdf = 0.5 * (1 + _erf(z / math.sqrt(2)))
    return z * cdf, cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z):
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    t = np.tanh(inner)
    d_inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * d_inner


# name -> function of z that returns the value and the derivative.
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda z: (np.maximum(z, 0), (z > 0) * 1.0),
    "relu2": lambda z: (np.maximum(z, 0) ** 2, 2 * np.maximum(z, 0)),
    "leaky_relu": lambda z: (np.where(z >= 0, z, 0.01 * z), np.where(z >= 0, 1.0, 0.01)),
    "silu": lambda z: (z * _sigmoid(z), _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "tanh": lambda z: (np.tanh(z), 1 - np.tanh(z) ** 2),
    "identity": lambda z: (z, np.ones_like(z)),
    "abs": lambda z: (np.abs(z), np.sign(z)),
    "softplus": lambda z: (np.logaddexp(0, z), _sigmoid(z)),
}


def hashed(token: int, salt: int, n: int) -> int:
    """A number below n for an id, in Python's own integers: the finaliser of MurmurHash3, mod n."""
    h = int(token) ^ int(salt)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) % 2**32
    return (h ^ (h >> 16)) % n


class Step(NamedTuple):
    """A visited node: heap index, rows of its units, their pre-activations, decision logit."""

    node: int
    rows: slice
    z: np.ndarray
    r: float


class Result(NamedTuple):
    """y [T, E], leaf [T, P], and per token and tree the visited nodes."""

    y: np.ndarray
    leaf: np.ndarray
    paths: list[list[list[Step]]]


def to_float64(tree):
    """The same weights as float64 NumPy arrays."""
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)


def rows_of(spec, node):
    """The units of a heap node: levels from the root, in each level nodes from the left, in each node W_l."""
    widths = spec.shape.node_width
    if isinstance(widths, int):
        widths = [widths] * (spec.shape.depth + 1)
    level, first_node, start = 0, 0, 0
    while node >= first_node + 2**level:
        start += 2**level * widths[level]
        first_node += 2**level
        level += 1
    start += (node - first_node) * widths[level]
    return slice(start, start + widths[level])


def unit(spec, z):
    """What a unit contributes, and the derivative of that: the activation, or z itself at site `sum`."""
    return ACTIVATIONS[spec.activation](z) if spec.act_site == "node" else (z, np.ones_like(z))


def _visit(params, x, spec, tree, node) -> Step:
    rows = rows_of(spec, node)
    z = params["w_in"][tree, rows] @ x + params["b_in"][tree, rows]
    if node >= 2**spec.shape.depth - 1:
        return Step(node, rows, z, math.nan)
    decider = params["router"]["w"][tree, node] @ x if spec.router == "frozen" else z[0]
    return Step(node, rows, z, decider - params["threshold"][tree, node])


def _is_there(spec, kept_J, node, level):
    below = 2 ** (spec.shape.depth - level)
    place = node - (2**level - 1)
    return kept_J is None or bool(kept_J[place * below : (place + 1) * below].any())


def _descend(params, x, spec, tree, node=0, leaf=None, kept_J=None) -> list[Step]:
    """The path from a node to the bottom, by decisions or to a leaf that is given."""
    steps, level, depth = [], int(math.log2(node + 1)), spec.shape.depth
    while True:
        steps.append(_visit(params, x, spec, tree, node))
        if level == depth:
            return steps
        right = bool(steps[-1].r > 0) if leaf is None else bool(leaf >> (depth - 1 - level) & 1)
        level += 1
        node = 2 * node + 1 + right
        if not _is_there(spec, kept_J, node, level):
            node += -1 if right else 1


def _sum(params, spec, tree, steps):
    return sum(unit(spec, step.z)[0] @ params["w_out"][tree, step.rows] for step in steps)


def forward(params, x_TE, spec, leaf_TP=None, kept_PJ=None) -> Result:
    """The output, along the layer's own paths or those to `leaf_TP`; of a pruned one, to leaves `kept_PJ`."""
    params, x_TE = to_float64(params), to_float64(x_TE)
    y, paths = np.zeros_like(x_TE), []
    for t, x in enumerate(x_TE):
        paths.append([
            _descend(
                params, x, spec, p, leaf=None if leaf_TP is None else int(leaf_TP[t, p]),
                kept_J=None if kept_PJ is None else kept_PJ[p],
            )
            for p in range(spec.shape.n_trees)
        ])  # fmt: skip
        total = sum(_sum(params, spec, p, steps) for p, steps in enumerate(paths[t]))
        y[t] = params["b_out"] + (
            total if spec.act_site == "node" else ACTIVATIONS[spec.activation](total)[0]
        )
    leaf = [[steps[-1].node - (2**spec.shape.depth - 1) for steps in trees] for trees in paths]
    return Result(y, np.array(leaf, np.int32).reshape(len(x_TE), spec.shape.n_trees), paths)


def _learned(params, x, spec, tree, steps, d_sum):
    """dL/dr at every level of a path, by the straight-through rule."""
    d_r = np.zeros(spec.shape.depth)
    for level, (above, taken) in enumerate(zip(steps, steps[1:])):
        is_right = taken.node == 2 * above.node + 2
        other = _descend(params, x, spec, tree, node=taken.node + (-1 if is_right else 1))
        gain = _sum(params, spec, tree, steps[level + 1 :]) - _sum(params, spec, tree, other)
        s = _sigmoid(above.r)
        d_r[level] = s * (1 - s) * (d_sum @ gain) * (1 if is_right else -1)
    return d_r


def backward(params, x_TE, spec, dy_TE, leaf_TP=None, kept_PJ=None):
    """Gradients of sum(dy * y): a dict of the trained weights, and dx [T, E]."""
    paths = forward(params, x_TE, spec, leaf_TP, kept_PJ).paths
    params, x_TE, dy_TE = to_float64(params), to_float64(x_TE), to_float64(dy_TE)
    grads = {name: np.zeros_like(params[name]) for name in ("w_in", "b_in", "w_out", "b_out")}
    dx_TE = np.zeros_like(x_TE)
    for t, (x, dy) in enumerate(zip(x_TE, dy_TE)):
        grads["b_out"] += dy
        d_sum = dy
        if spec.act_site == "sum":
            total = sum(_sum(params, spec, p, steps) for p, steps in enumerate(paths[t]))
            d_sum = dy * ACTIVATIONS[spec.activation](total)[1]
        for p, steps in enumerate(paths[t]):
            d_r = np.zeros(spec.shape.depth)
            if spec.routing == "straight_through":
                d_r = _learned(params, x, spec, p, steps, d_sum)
            for level, step in enumerate(steps):
                value, slope = unit(spec, step.z)
                grads["w_out"][p, step.rows] += np.outer(value, d_sum)
                dz = (params["w_out"][p, step.rows] @ d_sum) * slope
                if level < spec.shape.depth:
                    dz[0] += d_r[level]
                grads["w_in"][p, step.rows] += np.outer(dz, x)
                grads["b_in"][p, step.rows] += dz
                dx_TE[t] += dz @ params["w_in"][p, step.rows]
    return grads, dx_TE


def decision_margin(params, x_TE, spec, leaf_TP):
    """|r| and its rounding bound at the first node where `leaf_TP` leaves the oracle's own path.

    A logit that is summed in float32 from exactly represented factors errs by at most
    (E + 4) 2^-24 (sum |w x| + |b| + |threshold|), to first order. One pair for each leaf that differs.
    """
    params, x_TE = to_float64(params), to_float64(x_TE)
    own, given = (forward(params, x_TE, spec, leaf) for leaf in (None, leaf_TP))
    pairs = []
    for t, p in np.argwhere(own.leaf != np.asarray(leaf_TP)):
        steps, other = own.paths[t][p], given.paths[t][p]
        level = next(l for l in range(len(steps)) if steps[l].node != other[l].node) - 1
        first, node = steps[level].rows.start, steps[level].node
        size = np.abs(params["w_in"][p, first]) @ np.abs(x_TE[t])
        size += abs(params["b_in"][p, first]) + abs(params["threshold"][p, node])
        pairs.append((abs(steps[level].r), (x_TE.shape[1] + 4) * 2.0**-24 * size))
    return pairs


def sum_of_experts(params, x_TE, ids_TK, gates_TK, units_of, act, ds_TE):
    """What `combine` computes for given choices, and the gradients of sum(ds * s).

    Args:
      params: {w_in [F,E], b_in [F], w_out [F,E]}.
      units_of: from an id to the rows of its units.
      act: of `ACTIVATIONS`.

    Returns:
      s [T, E]; gradients of w_in, b_in, w_out, x and gates.
    """
    params, x_TE, gates_TK, ds_TE = (to_float64(a) for a in (params, x_TE, gates_TK, ds_TE))
    grads = {name: np.zeros_like(params[name]) for name in ("w_in", "b_in", "w_out")}
    grads |= {"x": np.zeros_like(x_TE), "gates": np.zeros_like(gates_TK)}
    s_TE = np.zeros_like(x_TE)
    for t, k in np.ndindex(gates_TK.shape):
        rows, gate = list(units_of(int(ids_TK[t, k]))), gates_TK[t, k]
        w_in, w_out = params["w_in"][rows], params["w_out"][rows]
        value, slope = act(w_in @ x_TE[t] + params["b_in"][rows])
        s_TE[t] += gate * value @ w_out
        along = w_out @ ds_TE[t]
        grads["gates"][t, k] = value @ along
        grads["w_out"][rows] += gate * np.outer(value, ds_TE[t])
        grads["b_in"][rows] += gate * along * slope
        grads["w_in"][rows] += np.outer(gate * along * slope, x_TE[t])
        grads["x"][t] += (gate * along * slope) @ w_in
    return s_TE, grads
