"""The leaf layer in float64 NumPy, forward and backward, written from its definition alone.

It shares nothing with `tree_ffn.tree.leaf` but the fields of a LeafSpec: loops over tokens, nodes and
experts, every derivative by hand.

    tree: r[n] = <w[n], x> + b[n];   log p(leaf) = sum over the ancestors n of log s(+-r[n])
    softmax: log p(j) = r[j] - log sum exp r
    J = the K best of log p, made of r + bias (ties: the lower id; NaN is the lowest);   g[j] = p[j] / norm
    y = b_out + sum over j of (leak + (1 - leak) g[j]) sum_u act(<w_in[j,u], x> + b_in[j,u]) w_out[j,u]
"""

import math
from typing import NamedTuple

import numpy as np

from tests.oracle import ACTIVATIONS, hashed


class Result(NamedTuple):
    """y [T, E], the sets of chosen experts, {expert: gate} a token, and gradients by parameter."""

    y: np.ndarray
    chosen: list[list[int]]
    gates: list[dict[int, float]]
    gradients: dict[str, np.ndarray]


def log_s(r):
    return -math.log1p(math.exp(-r)) if r > 0 else r - math.log1p(math.exp(r))


def s(r):
    return math.exp(log_s(r))


def row_of(spec, tree, level, node):
    """Row of the router of a tree's node: level by level, in each tree by tree."""
    return spec.n_trees * (2**level - 1) + tree * 2**level + node


def ancestors(spec, expert):
    """(row of the router, whether the path goes right) of every decision above an expert."""
    tree, leaf = divmod(expert, 2**spec.depth)
    D = spec.depth
    above = [(leaf >> (D - level), leaf >> (D - level - 1) & 1) for level in range(D)]
    return [(row_of(spec, tree, level, node), bool(right)) for level, (node, right) in enumerate(above)]


def log_p(spec, r):
    """Of every expert."""
    if spec.router == "tree":
        paths = (ancestors(spec, j) for j in range(spec.n_experts))
        return np.array([sum(log_s(r[n] if right else -r[n]) for n, right in path) for path in paths])
    return r - (r.max() + math.log(np.exp(r - r.max()).sum()))


def best(scores, k):
    """The k places of the highest scores."""
    order = sorted(range(len(scores)), key=lambda j: (math.inf if math.isnan(scores[j]) else -scores[j], j))
    return sorted(order[:k])


def search(spec, r):
    """The experts that a search finds which keeps K nodes of every level, of all trees."""
    kept = [(tree, 0, 0.0) for tree in range(spec.n_trees)]
    for level in range(spec.depth):
        below = []
        for tree, node, score in kept:
            logit = r[row_of(spec, tree, level, node)]
            below += [(tree, 2 * node, score + log_s(-logit)), (tree, 2 * node + 1, score + log_s(logit))]
        order = sorted(below, key=lambda one: (-one[2], one[0] * 2 ** (level + 1) + one[1]))
        kept = sorted(order[: spec.top_k])
    return sorted(tree * 2**spec.depth + node for tree, node, _ in kept)


def leaf_layer(params, x, spec, token=None, dy=None, leak=0.0, hashes=hashed):
    """What the layer computes for float64 arrays; gradients of sum(dy * y) where dy is given."""
    act = lambda z: ACTIVATIONS[spec.activation](z, 0.01)
    grads = {name: np.zeros_like(params[name]) for name in ("w_in", "b_in", "w_out", "b_out")}
    grads |= {name: np.zeros_like(params[name]) for name in ("w_router", "b_router") if name in params}
    grads["x"] = np.zeros_like(x)
    y, chosen, all_gates = np.zeros_like(x), [], []
    for t in range(len(x)):
        if spec.router == "hash":
            js, gates, lp, r = [hashes(token[t], params["salt"], spec.n_experts)], np.ones(1), None, None
        else:
            w = params["router"]["w"] if spec.router == "random" else params["w_router"]
            r = w @ x[t] + (params["b_router"] if spec.router == "tree" else 0.0)
            preferred = r + params.get("selection_bias", 0.0)
            beam, lp = spec.search == "beam", log_p(spec, r)
            js = search(spec, preferred) if beam else best(log_p(spec, preferred), spec.top_k)
            p = np.exp(lp[js])
            gates = p / {"none": 1.0, "l1": p.sum(), "l2": math.sqrt((p * p).sum())}[spec.gate_norm]
        gate = np.zeros(spec.n_experts)
        gate[js] = gates
        weight = leak + (1 - leak) * gate
        z = params["w_in"] @ x[t] + params["b_in"]
        value, slope = act(z)
        y[t] = params["b_out"] + np.einsum("x,xw,xwe->e", weight, value, params["w_out"])
        chosen.append(js)
        all_gates.append(dict(zip(js, gates)))
        if dy is None:
            continue
        out = params["w_out"] @ dy[t]  # [X, W]
        grads["b_out"] += dy[t]
        grads["w_out"] += (weight[:, None] * value)[..., None] * dy[t]
        dz = weight[:, None] * slope * out
        grads["b_in"] += dz
        grads["w_in"] += dz[..., None] * x[t]
        grads["x"][t] += np.einsum("xw,xwe->e", dz, params["w_in"])
        if spec.router == "hash":
            continue
        dg = (1 - leak) * (value * out).sum(axis=1)[js]
        mean = (dg * gates).sum()
        dlp = gates * {"none": dg, "l1": dg - mean, "l2": dg - gates * mean}[spec.gate_norm]
        dr = np.zeros_like(r)
        if spec.router == "tree":
            for j, d in zip(js, dlp):
                for n, right in ancestors(spec, j):
                    dr[n] += d * (s(-r[n]) if right else -s(r[n]))
        else:
            dr[js] += dlp
            dr -= np.exp(lp) * dlp.sum()
        grads["x"][t] += dr @ w
        if "w_router" in params:
            grads["w_router"] += dr[:, None] * x[t]
        if "b_router" in params:
            grads["b_router"] += dr
    return Result(y, chosen, all_gates, grads)
