"""The layer of trees in float64 NumPy, forward and backward, written from its definition alone.

It shares nothing with `tree_ffn.tree` but the fields of a TreeSpec: plain loops over tokens, trees and
levels, every derivative by hand. What the three executions compute is compared with this.

    z[p,n,u] = <w_in[p,n,u], x> + b_in[p,n,u]          r[p,n] = z[p,n,0] - threshold[p,n]
    n_0 = 0;  n_{l+1} = 2 n_l + 1 + [r[p,n_l] > 0]     (ties and NaN go left)
    y = b_out + sum_p sum_l g[p,l] sum_u act(z[p,n_l,u]) w_out[p,n_l,u] + shared units
      + leak sum_p sum_n (n not on the path) sum_u act(z[p,n,u]) w_out[p,n,u]
    with a leak, g on the path is leak + (1 - leak) g
    with a beam, n_l are those above the leaf that `search` finds
"""

import math
from typing import NamedTuple

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z):
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))


def _gelu(z, slope):
    cdf = 0.5 * (1 + _erf(z / math.sqrt(2)))
    return z * cdf, cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z, slope):
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    t = np.tanh(inner)
    d_inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * d_inner


# name -> function of (z, negative slope) that returns the value and the derivative.
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda z, slope: (np.maximum(z, 0), (z > 0) * 1.0),
    "relu2": lambda z, slope: (np.maximum(z, 0) ** 2, 2 * np.maximum(z, 0)),
    "leaky_relu": lambda z, slope: (np.where(z >= 0, z, slope * z), np.where(z >= 0, 1.0, slope)),
    "silu": lambda z, slope: (z * _sigmoid(z), _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "tanh": lambda z, slope: (np.tanh(z), 1 - np.tanh(z) ** 2),
    "identity": lambda z, slope: (z, np.ones_like(z)),
    "abs": lambda z, slope: (np.abs(z), np.sign(z)),
    "softplus": lambda z, slope: (np.logaddexp(0, z), _sigmoid(z)),
}


def hashed(token: int, salt: int, n: int) -> int:
    """A number below n for an id, in Python's own integers: the finaliser of MurmurHash3, mod n."""
    h = int(token) ^ int(salt)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) % 2**32
    return (h ^ (h >> 16)) % n


class Step(NamedTuple):
    """A visited node: heap index, rows of its units, their pre-activations, decision logit, gate."""

    node: int
    rows: slice
    z: np.ndarray
    r: float
    gate: float


class Result(NamedTuple):
    """y [T, E], leaf [T, P], and per token and tree the visited nodes."""

    y: np.ndarray
    leaf: np.ndarray
    paths: list[list[list[Step]]]


def to_float64(params):
    """The same weights as float64 NumPy arrays."""
    if isinstance(params, dict):
        return {name: to_float64(value) for name, value in params.items()}
    return np.asarray(params).astype(np.float64)


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


def is_silent(spec, node):
    """Whether a heap node's first unit only decides: it has no row of w_out."""
    return spec.router == "silent" and 2**spec.hash_levels - 1 <= node < 2**spec.shape.depth - 1


def out_rows_of(spec, node):
    """The rows of w_out of a heap node's units."""
    rows, missing = rows_of(spec, node), sum(is_silent(spec, before) for before in range(node))
    return slice(rows.start - missing, rows.stop - missing - is_silent(spec, node))


def _act(spec, z):
    return ACTIVATIONS[spec.activation](z, 0.01)  # leaky_relu's slope


def _unit(spec, z):
    """What a unit contributes, and the derivative of that: the activation, or z itself at site `sum`."""
    return _act(spec, z) if spec.act_site == "node" else (z, np.ones_like(z))


def _visit(params, x, spec, tree, node):
    rows = rows_of(spec, node)
    z = params["w_in"][tree, rows] @ x + params["b_in"][tree, rows]
    decider = z[0]
    if spec.router == "frozen":
        deciding = node < 2**spec.shape.depth - 1
        decider = params["router"]["w"][tree, node] @ x if deciding else np.nan
    return rows, z, decider - params["threshold"][tree, node]


def _c(spec, r, right):
    """What a decision of logit r lets through where the path goes right, or left."""
    if spec.beam > 1:
        return float(_sigmoid(spec.kappa * (r if right else -r)))
    if spec.openness == "logistic":
        return 1 / (1 + math.exp(-spec.kappa * abs(r)))
    return 1 - math.exp(-spec.kappa * abs(r))


def _c_slope(spec, r, right):
    """dc/dr."""
    if spec.beam > 1:
        c = _c(spec, r, right)
        return spec.kappa * c * (1 - c) * (1 if right else -1)
    e = math.exp(-spec.kappa * abs(r))
    return spec.kappa * e * np.sign(r) / ((1 + e) ** 2 if spec.openness == "logistic" else 1)


def _sides(params, spec, tree, token):
    """The decisions that a hash of the id takes, root first: its bits."""
    n = spec.hash_levels
    place = hashed(token, params["salt"][tree], 2**n) if n else 0
    return [bool(place >> (n - 1 - level) & 1) for level in range(n)]


def search(params, x, spec, tree, sides=(), is_there=lambda node: True):
    """The leaf that a beam finds: of every level it keeps the nodes of the largest gates."""
    kept = [(1.0, 0)]
    for level in range(spec.shape.depth):
        found = []
        for gate, node in kept:
            r = _visit(params, x, spec, tree, node)[2]
            for right in (False, True):
                if level < len(sides):
                    child_gate = gate if right == sides[level] else None
                else:
                    child_gate = gate * _c(spec, r, right)
                child = 2 * node + 1 + right
                if child_gate is not None and is_there(child):
                    found.append((child_gate, child))
        kept = sorted(found, key=lambda pair: -pair[0])[: spec.beam]
    return kept[0][1] - (2**spec.shape.depth - 1)


def _descend(params, x, spec, tree, node=0, leaf=None, sides=()):
    """The hard path from `node` to the bottom; through `leaf` where one is given, else first by `sides`."""
    depth, steps, gates = spec.shape.depth, [], []
    level = int(math.log2(node + 1))
    while True:
        rows, z, r = _visit(params, x, spec, tree, node)
        gate = 1.0
        if spec.routing == "continuous" and gates:
            gate = min(gates) if spec.gate == "min" else math.prod(gates)
        steps.append(Step(node, rows, z, r, gate))
        if level == depth:
            return steps
        if leaf is not None:
            right = bool(leaf >> (depth - 1 - level) & 1)
        else:
            right = sides[level] if level < len(sides) else bool(r > 0)
        if spec.routing == "continuous":
            gates.append(_c(spec, r, right) if level >= spec.hash_levels else 1.0)
        node = 2 * node + 1 + right
        level += 1


def _off_path(params, x, spec, tree, steps, leak):
    """The nodes that the path does not visit, with the leak for a gate; none without a leak."""
    visited = {step.node for step in steps}
    nodes = range(2 ** (spec.shape.depth + 1) - 1) if leak else ()
    return [Step(node, *_visit(params, x, spec, tree, node), leak) for node in nodes if node not in visited]


def _node_units(spec, step):
    """`_unit` of a node's units that have rows of w_out."""
    return _unit(spec, step.z[is_silent(spec, step.node) :])


def _path_sum(params, spec, tree, steps):
    return sum(
        s.gate * (_node_units(spec, s)[0] @ params["w_out"][tree, out_rows_of(spec, s.node)]) for s in steps
    )


def _pre_output(params, x, spec, paths, leak):
    """The sum over all active and leaking units, without b_out."""
    total = 0
    for tree, steps in enumerate(paths):
        total = total + _path_sum(params, spec, tree, steps + _off_path(params, x, spec, tree, steps, leak))
    if "shared" in params:
        shared = params["shared"]
        total = total + _unit(spec, shared["w_in"] @ x + shared["b_in"])[0] @ shared["w_out"]
    return total


def _norm(spec, gates):
    """What the gates of a token's leaves are divided by."""
    return sum(gates) if spec.gate_norm == 1 else math.sqrt(sum(g * g for g in gates))


def forward(params, x_TE, spec, leaf_TP=None, token_T=None, leak=0.0) -> Result:
    """The layer's output, along the paths to `leaf_TP` or its own, whose hashed sides `token_T` decide."""
    params, x_TE = to_float64(params), to_float64(x_TE)
    y, leaf, all_paths = np.zeros_like(x_TE), [], []
    for t, x in enumerate(x_TE):
        paths = []
        for p in range(spec.shape.n_trees):
            given = None if leaf_TP is None else int(leaf_TP[t, p])
            sides = () if token_T is None else _sides(params, spec, p, token_T[t])
            if given is None and spec.beam > 1:
                given = search(params, x, spec, p, sides)
            paths.append(_descend(params, x, spec, p, leaf=given, sides=sides))
        share = _norm(spec, [steps[-1].gate for steps in paths]) if spec.renormalise else 1.0
        paths = [[s._replace(gate=leak + (1 - leak) * s.gate / share) for s in steps] for steps in paths]
        total = _pre_output(params, x, spec, paths, leak)
        y[t] = params["b_out"] + (total if spec.act_site == "node" else _act(spec, total)[0])
        leaf.append([steps[-1].node - (2**spec.shape.depth - 1) for steps in paths])
        all_paths.append(paths)
    return Result(y, np.array(leaf, np.int32).reshape(len(x_TE), spec.shape.n_trees), all_paths)


def _decision_gradients(params, x, spec, tree, steps, d_sum, d_gates, leak):
    """dL/dr of every visited deciding node, from routing alone."""
    depth = spec.shape.depth
    d_r = np.zeros(depth + 1)
    if spec.routing == "straight_through":
        for level in range(spec.hash_levels, depth):
            taken = steps[level + 1].node
            left = 2 * steps[level].node + 1
            other = left + 1 if taken == left else left
            value_taken = _path_sum(params, spec, tree, steps[level + 1 :])
            value_other = _path_sum(params, spec, tree, _descend(params, x, spec, tree, node=other))
            rise = value_taken - value_other if taken == left + 1 else value_other - value_taken
            e = math.exp(-abs(spec.beta * steps[level].r))
            d_r[level] = (1 - leak) * spec.beta * e / (1 + e) ** 2 * (d_sum @ rise)
    if spec.routing == "continuous":
        rights = [below.node % 2 == 0 for below in steps[1:]]
        c = [_c(spec, step.r, right) for step, right in zip(steps, rights)]
        c[: spec.hash_levels] = [1.0] * spec.hash_levels
        d_c = np.zeros(depth)
        for level in range(1, depth + 1):
            if spec.gate == "min":
                d_c[c[:level].index(min(c[:level]))] += d_gates[level]  # index: the one nearest the root
            else:
                for j in range(level):
                    d_c[j] += d_gates[level] * math.prod(c[:j] + c[j + 1 : level])
        for level in range(spec.hash_levels, depth):
            r = steps[level].r
            d_r[level] = (1 - leak) * d_c[level] * _c_slope(spec, r, rights[level])
    return d_r


def _gate_gradients(params, x, spec, leaf_P, d_gates):
    """dL/dg of every tree and level from dL/d(g / n), n the norm of the leaves' g, where it divides."""
    d_gates = np.array(d_gates)
    if not spec.renormalise:
        return d_gates
    paths = [_descend(params, x, spec, p, leaf=int(leaf)) for p, leaf in enumerate(leaf_P)]
    gates = np.array([[step.gate for step in steps] for steps in paths])
    norm = _norm(spec, gates[:, -1])
    d_norm = -(d_gates * gates).sum() / norm**2
    of_leaf = 1.0 if spec.gate_norm == 1 else gates[:, -1:] / norm  # dn/dg
    return d_gates / norm + d_norm * of_leaf * (np.arange(spec.shape.depth + 1) == spec.shape.depth)


def backward(params, x_TE, spec, dy_TE, leaf_TP=None, token_T=None, leak=0.0):
    """Gradients of sum(dy * y): a dict like params (without threshold and router), and dx [T, E]."""
    params, x_TE, dy_TE = to_float64(params), to_float64(x_TE), to_float64(dy_TE)
    grads = {name: np.zeros_like(params[name]) for name in ("w_in", "b_in", "w_out", "b_out")}
    if "shared" in params:
        grads["shared"] = {name: np.zeros_like(w) for name, w in params["shared"].items()}
    dx_TE = np.zeros_like(x_TE)
    result = forward(params, x_TE, spec, leaf_TP, token_T, leak)
    for t, (x, dy) in enumerate(zip(x_TE, dy_TE)):
        grads["b_out"] += dy
        d_sum = dy
        if spec.act_site == "sum":
            d_sum = dy * _act(spec, _pre_output(params, x, spec, result.paths[t], leak))[1]
        d_gates, d_units = [], []
        for p, steps in enumerate(result.paths[t]):
            d_z, d_weights = [], []
            working = steps + _off_path(params, x, spec, p, steps, leak)
            for step in working:
                value, slope = _node_units(spec, step)
                out_rows = out_rows_of(spec, step.node)
                along = params["w_out"][p, out_rows] @ d_sum
                grads["w_out"][p, out_rows] += step.gate * np.outer(value, d_sum)
                d_z.append(np.zeros_like(step.z))
                d_z[-1][is_silent(spec, step.node) :] = step.gate * along * slope
                d_weights.append(value @ along)
            d_gates.append(d_weights[: len(steps)])
            d_units.append((steps, working, d_z))
        d_gates = _gate_gradients(params, x, spec, result.leaf[t], d_gates)
        for p, (steps, working, d_z) in enumerate(d_units):
            if spec.router != "frozen":
                d_r = _decision_gradients(params, x, spec, p, steps, d_sum, d_gates[p], leak)
                for level in range(spec.shape.depth + 1):
                    d_z[level][0] += d_r[level]
            for step, d_step in zip(working, d_z):
                grads["w_in"][p, step.rows] += np.outer(d_step, x)
                grads["b_in"][p, step.rows] += d_step
                dx_TE[t] += d_step @ params["w_in"][p, step.rows]
        if "shared" in params:
            shared, d_shared = params["shared"], grads["shared"]
            value, slope = _unit(spec, shared["w_in"] @ x + shared["b_in"])
            d_shared["w_out"] += np.outer(value, d_sum)
            dz = (shared["w_out"] @ d_sum) * slope
            d_shared["w_in"] += np.outer(dz, x)
            d_shared["b_in"] += dz
            dx_TE[t] += dz @ shared["w_in"]
    return grads, dx_TE


def decision_margin(params, x_TE, spec, leaf_TP):
    """|r| and its rounding bound at the first node where `leaf_TP` leaves the oracle's own path.

    A logit that is summed in float32 from exactly represented factors errs by at most
    (E + 4) 2^-24 (sum |w x| + |b| + |threshold|), to first order. One pair for each leaf that differs.
    """
    params, x_TE = to_float64(params), to_float64(x_TE)
    pairs = []
    own = forward(params, x_TE, spec)
    given = forward(params, x_TE, spec, leaf_TP)
    for t, p in np.argwhere(own.leaf != np.asarray(leaf_TP)):
        steps, other = own.paths[t][p], given.paths[t][p]
        level = next(l for l in range(len(steps)) if steps[l].node != other[l].node) - 1
        rows, node = steps[level].rows, steps[level].node
        size = np.abs(params["w_in"][p, rows.start]) @ np.abs(x_TE[t])
        size += abs(params["b_in"][p, rows.start]) + abs(params["threshold"][p, node])
        pairs.append((abs(steps[level].r), (x_TE.shape[1] + 4) * 2.0**-24 * size))
    return pairs
