"""The leaf layer in float64 NumPy, forward and backward, written from its definition alone.

It shares nothing with `tree_ffn.tree.leaf` but the fields of a LeafSpec: loops over tokens, nodes and
experts, every derivative by hand.

    tree: r[n] = <w[n], x> + b[n];   log p(leaf) = sum over the ancestors n of log s(+-r[n])
    softmax: log p(j) = r[j] - log sum exp r
    product_keys: experts in rows of n columns, m n = X, n the least that is at least m;
          log p(i n + j) = r[i] - log sum_i exp r[i] + r[m + j] - log sum_j exp r[m + j]
    J: flat routers: the K best of log p; tree: of every level the K best of the children of those above,
        at last of the leaves (ties: the lower id; NaN is the lowest). Where the load is balanced, of trees of
        log p made of r + bias, of flat routers of p + bias
    g[j] = p[j] / norm over J
    y = b_out + sum over j of (leak + (1 - leak) g[j]) sum_u act(<w_in[j,u], x> + b_in[j,u]) w_out[j,u]
"""

import math

import numpy as np

from tests.oracle import ACTIVATIONS, hashed, sum_of_experts, to_float64

NORMS = {
    "none": lambda p: 1.0,
    "l1": lambda p: p.sum(),
    "l2": lambda p: math.sqrt((p * p).sum()),
    "rms": lambda p: math.sqrt((p * p).mean()),
}


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
    if spec.router == "product_keys":
        m = len(r) - columns(spec)
        return np.add.outer(log_softmax(r[:m]), log_softmax(r[m:])).reshape(-1)
    return log_softmax(r)


def columns(spec):
    """Of the rectangle of experts."""
    return min(n for n in range(1, spec.n_experts + 1) if spec.n_experts % n == 0 and n * n >= spec.n_experts)


def log_softmax(r):
    return r - (r.max() + math.log(np.exp(r - r.max()).sum()))


def best(scores, k):
    """The k places of the highest scores."""
    order = sorted(range(len(scores)), key=lambda j: (math.inf if math.isnan(scores[j]) else -scores[j], j))
    return sorted(order[:k])


def search(spec, r, keep_X, gaps=None):
    """The experts that a search finds which keeps K nodes of every level, of those with an expert left.

    `gaps`, a list, is given by how much the last that is kept is ahead of the first that is not.
    """
    is_there = lambda level, tree, node: keep_X.reshape(spec.n_trees, 2**level, -1)[tree, node].any()
    kept = [(tree, 0, 0.0) for tree in range(spec.n_trees) if is_there(0, tree, 0)]
    for level in range(spec.depth):
        below = []
        for tree, node, score in kept:
            logit = r[row_of(spec, tree, level, node)]
            for child, log in ((2 * node, log_s(-logit)), (2 * node + 1, log_s(logit))):
                if is_there(level + 1, tree, child):
                    below.append((tree, child, score + log))
        below.sort(key=lambda one: (-one[2], *one[:2]))
        if gaps is not None and len(below) > spec.top_k:
            gaps.append(below[spec.top_k - 1][2] - below[spec.top_k][2])
        kept = sorted(below[: spec.top_k])
    return sorted(tree * 2**spec.depth + node for tree, node, _ in kept)


def preferred(params, spec, r, keep_X):
    """The chosen experts by the logits of a token, ascending, of those that are left."""
    bias = params.get("selection_bias", 0.0)
    if spec.router == "tree":
        return search(spec, r + bias, keep_X)
    return best(np.where(keep_X, np.exp(log_p(spec, r)) + bias, np.nan), spec.top_k)


def route(params, x, spec, token=None, dg=None, keep_X=None):
    """Experts, ascending, and gates of every token, both [T, K]; gradients of sum(dg * gates).

    Those are a dict of x and the router's trained weights, of zeros unless dg is given. Of a pruned layer,
    whose experts `keep_X` are left, these are weights of the full one.
    """
    params, x = to_float64(params), to_float64(x)
    if spec.router == "hash":
        ids = np.array([hashed(one, params["salt"], spec.n_experts) for one in token], int)[:, None]
        return ids, np.ones(ids.shape), {"x": np.zeros_like(x)}
    keep_X = np.ones(spec.n_experts, bool) if keep_X is None else keep_X
    w = params["router"]["w"] if spec.router == "random" else params["w_router"]
    r_TR = x @ w.T + params.get("b_router", 0.0)
    ids = np.array([preferred(params, spec, r, keep_X) for r in r_TR], int).reshape(len(x), spec.top_k)
    lp_TX = np.array([log_p(spec, r) for r in r_TR]).reshape(len(x), spec.n_experts)
    p_TK = np.exp(np.take_along_axis(lp_TX, ids, axis=1))
    gates = np.array([p / NORMS[spec.gate_norm](p) for p in p_TK]).reshape(ids.shape)
    grads = {name: np.zeros_like(params[name]) for name in ("w_router", "b_router") if name in params}
    grads["x"] = np.zeros_like(x)
    for t in range(len(x)) if dg is not None else ():
        dr = logit_gradients(spec, r_TR[t], lp_TX[t], ids[t], gates[t], dg[t])
        grads["x"][t] = dr @ w
        if "w_router" in grads:
            grads["w_router"] += np.outer(dr, x[t])
        if "b_router" in grads:
            grads["b_router"] += dr
    return ids, gates, grads


def logit_gradients(spec, r, lp, js, g, dg):
    """dL/dr of a token from dL/dgates, its choice held."""
    by_norm = {"none": 0.0, "l1": 1.0, "l2": g, "rms": g / len(js)}  # d log norm / d log p, over g
    dlp = g * (dg - by_norm[spec.gate_norm] * (dg * g).sum())
    dr = np.zeros_like(r)
    if spec.router == "product_keys":
        n = columns(spec)
        m = len(r) - n
        for j, d in zip(js, dlp):
            dr[[j // n, m + j % n]] += d
        both = np.concatenate([np.exp(log_softmax(r[:m])), np.exp(log_softmax(r[m:]))])
        return dr - both * dlp.sum()
    if spec.router != "tree":
        dr[js] += dlp
        return dr - np.exp(lp) * dlp.sum()
    for j, d in zip(js, dlp):
        for n, right in ancestors(spec, j):
            dr[n] += d * (s(-r[n]) if right else -s(r[n]))
    return dr


def leaf_layer(params, x, spec, token=None, dy=None, leak=0.0, keep_X=None):
    """(y [T, E], ids [T, K] ascending, gradients of sum(dy * y), empty unless dy is given)."""
    ids, gates, _ = route(params, x, spec, token, None, keep_X)
    weights = np.full((len(x), spec.n_experts), leak)
    np.put_along_axis(weights, ids, leak + (1 - leak) * gates, axis=1)
    everyone = np.tile(np.arange(spec.n_experts), (len(x), 1))
    W, E = spec.expert_width, x.shape[1]
    flat = {"w_in": (-1, E), "b_in": (-1,), "w_out": (-1, E)}
    units = {name: to_float64(params[name]).reshape(shape) for name, shape in flat.items()}
    of = lambda j: range(j * W, (j + 1) * W)
    ds = np.zeros_like(x) if dy is None else dy
    y, grads = sum_of_experts(units, x, everyone, weights, of, ACTIVATIONS[spec.activation], ds)
    y = y + to_float64(params["b_out"])
    if dy is None:
        return y, ids, {}
    dg = (1 - leak) * np.take_along_axis(grads.pop("gates"), ids, axis=1)
    _, _, routed = route(params, x, spec, token, dg, keep_X)
    grads = {name: grad.reshape(np.shape(params.get(name, x))) for name, grad in grads.items()}
    return y, ids, {**grads, **routed, "x": grads["x"] + routed["x"], "b_out": dy.sum(axis=0)}
