"""Decisions, paths and gates: how a token finds its way down a tree.

The decision logit of node n is r[n] = z[n, 0] - threshold[n], the pre-activation
of the node's first unit against a threshold that no optimizer touches. A token
goes right where r > 0; ties and NaN go left. The path is always hard; `routing`
says only how decisions learn and how a path's units are weighted.
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree import usage
from tree_ffn.tree.activations import absolute, activation
from tree_ffn.tree.layout import Layout, layout_of
from tree_ffn.tree.spec import PrunedSpec, TreeSpec


def surrogate_slope(r: jax.Array, beta: float) -> jax.Array:
    """Derivative that straight-through routing gives a decision: beta s'(beta r), s the logistic function."""
    s = jax.nn.sigmoid(beta * r)
    return beta * s * (1 - s)


def child_gate(gate: jax.Array, r: jax.Array, spec: TreeSpec) -> jax.Array:
    """Gate of a node's children: g[0] = 1, g[l+1] = min(g[l], c(|r[l]|)), or the product.

    c(a) = 1 - exp(-kappa a) vanishes where the decision flips, so the output is
    a continuous function of the input although the path is hard. At equal gates
    the one nearest the root keeps the gradient; d|r|/dr is 0 at r = 0.

    Args:
      gate: the node's own gate, any shape.
      r: its decision logit, the same shape; with a beam, `towards` the child.
      spec: `routing`, `gate` and `kappa` are read; other routings keep the gate.
    """
    if spec.routing != "continuous":
        return gate
    return narrow_gate(gate, openness(r, spec), spec)


def openness(r: jax.Array, spec: TreeSpec) -> jax.Array:
    """c(|r|): how far a decision is from flipping, up to 1: 1 - exp(-kappa |r|), or the logistic function.

    With a beam it is c(r): a token may take the less likely side.
    """
    if spec.beam > 1:
        return jax.nn.sigmoid(spec.kappa * r)
    if spec.openness == "logistic":
        return jax.nn.sigmoid(spec.kappa * absolute(r))
    return -jnp.expm1(-spec.kappa * absolute(r))


def towards(r: jax.Array, right: jax.Array, spec: TreeSpec) -> jax.Array:
    """What `openness` takes: r itself; with a beam r where a path goes right, and -r where it goes left."""
    return r if spec.beam == 1 else jnp.where(right, r, -r)


def narrow_gate(gate: jax.Array, own: jax.Array, spec: TreeSpec) -> jax.Array:
    """The gate below a decision of openness `own`: the minimum of the two, or their product."""
    return gate * own if spec.gate == "product" else jnp.where(own < gate, own, gate)


def unit_activation(spec: TreeSpec):
    """What a unit's pre-activation becomes: act at site `node`, itself at site `sum`."""
    if spec.act_site == "sum":
        return lambda z: z
    return activation(spec.activation, spec.negative_slope)


def hidden_on_path(
    z: jax.Array, threshold: jax.Array, spec: TreeSpec, right: jax.Array | None = None
) -> jax.Array:
    """Weights of a path's units in the output: g[l] * act(z[l, u]), without silent routers.

    Args:
      z: float32 [..., path units], pre-activations of the visited units, root first.
      threshold: [..., D] thresholds of the visited deciding nodes.
      spec: the layer.
      right: bool [..., D], where the path goes right; only a beam's gates need it.

    Returns:
      float32 [..., path units that have rows in w_out].
    """
    units, gated = unit_activation(spec)(z), spec.routing == "continuous" and spec.shape.depth > 0
    if not gated and spec.router != "silent":
        return units
    gates = _path_gates(z, threshold, spec, right) if gated else None
    runs = []
    for level, (end, width) in enumerate(zip(spec.shape.path_starts[1:], spec.output_widths)):
        run = units[..., end - width : end]
        runs.append(run if gates is None else gates[level][..., None] * run)
    return jnp.concatenate(runs, axis=-1)


def _path_gates(z: jax.Array, threshold: jax.Array, spec: TreeSpec, right) -> list[jax.Array]:
    """Gate of every level of a path; z, threshold and right as `hidden_on_path` takes them."""
    starts = spec.shape.path_starts[: spec.shape.depth]
    # One array for all decisions of the path: an exponential a level would be a kernel a level.
    first_units = jnp.concatenate([z[..., start : start + 1] for start in starts], axis=-1)
    open_D = openness(towards(first_units - threshold, right, spec), spec)
    gates = [jnp.ones_like(z[..., 0])]
    for level in range(spec.shape.depth):
        is_hashed = level < spec.hash_levels
        gates.append(gates[-1] if is_hashed else narrow_gate(gates[-1], open_D[..., level], spec))
    return gates


def decision_logits(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """Decision logits of all deciding nodes: float32 [T, P, R], without gradient.

    One small product over the R = 2^D - 1 routers of every tree; the way to
    route many tokens when only the leaves are wanted. Of a pruned layer, [T, 1, R]
    over its R kept deciding nodes, all trees together.
    """
    return jax.lax.stop_gradient(_logits(params, x_TE, spec))


def _logits(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    layout = layout_of(spec)
    params = layout.stacked(params)
    if spec.router == "frozen":
        w_PRE, b_PR = params["router"]["w"], 0.0
    else:
        routers = jnp.asarray(layout.router_units())
        w_PRE = jnp.take(params["w_in"], routers, axis=1)
        b_PR = jnp.take(params["b_in"], routers, axis=1).astype(jnp.float32)
    logits = jnp.einsum("te,pre->tpr", x_TE, w_PRE.astype(x_TE.dtype), preferred_element_type=jnp.float32)
    threshold_PR = params["threshold"][:, : layout.n_deciding].astype(jnp.float32)
    return logits + (b_PR - jax.lax.stop_gradient(threshold_PR))[None]


def renormalised(
    s_TE: jax.Array, params: dict, x_TE: jax.Array, place_TP: jax.Array, spec: TreeSpec
) -> jax.Array:
    """The sum of trees over the norm of their leaves' gates, where the layer says so: `TreeSpec.renormalise`.

    Args:
      s_TE: sum of the trees with gates as they are.
      params, x_TE, spec: of the layer.
      place_TP: places in the bottom level that tokens reach, as `leaves` gives them.
    """
    if not spec.renormalise:
        return s_TE
    layout = layout_of(spec, params)
    r_TPR, gate_TP = _logits(params, x_TE, spec), jnp.ones(place_TP.shape, jnp.float32)
    for level in range(spec.hash_levels, spec.shape.depth):
        node_TP = layout.node_starts[level] + layout.ancestor(level, place_TP)
        r_TP = towards(_at(r_TPR, node_TP, spec), layout.goes_right(level, place_TP), spec)
        gate_TP = child_gate(gate_TP, r_TP, spec)
    norm_T1 = gate_norm(gate_TP, spec.gate_norm)
    return (s_TE.astype(jnp.float32) / norm_T1).astype(s_TE.dtype)


def gate_norm(gate: jax.Array, order: int) -> jax.Array:
    """Norm of gates, which are at least 0, over their last axis, which stays: float32 [..., 1].

    Args:
      gate: float32 [..., n].
      order: 1, their sum; or 2, the root of the sum of their squares.
    """
    if order == 1:
        return gate.sum(axis=-1, keepdims=True)
    return jnp.sqrt((gate * gate).sum(axis=-1, keepdims=True))


def walk(
    r_TPR: jax.Array, spec: TreeSpec, right_TPH: jax.Array | None = None, layout: Layout | None = None
) -> jax.Array:
    """Places in the bottom level that tokens reach: int32 [T, P], of a pruned layer over all its trees.

    Args:
      r_TPR: decision logits, as `decision_logits` gives them.
      spec: the layer.
      right_TPH: the hashed sides of the first `hash_levels`.
      layout: of a pruned layer, with its structure.
    """
    layout = layout or layout_of(spec)
    if spec.beam > 1:
        logits = lambda level, place_TP: _at(r_TPR, layout.node_starts[level] + place_TP, spec)
        return search(logits, layout, r_TPR.shape[0], right_TPH)
    place_TP = layout.roots(r_TPR.shape[0])
    for level in range(spec.shape.depth):
        if right_TPH is not None and level < spec.hash_levels:
            right_TP = right_TPH[..., level]
        else:
            right_TP = _at(r_TPR, layout.node_starts[level] + place_TP, spec) > 0
        place_TP = layout.child(level, place_TP, right_TP)
    return place_TP


def search(logits, layout: Layout, n_tokens: int, right_TPH: jax.Array | None = None) -> jax.Array:
    """The leaf of the largest gate that a beam finds: its place in the bottom level, int32 [T, P].

    Of every level the `beam` nodes of the largest gates are kept, of equal ones those further left:

        g(child) = g(node) c(r) on the right, g(node) c(-r) on the left,    c the logistic function of kappa r

    It differs from going down node by node where a token would turn away from the likelier leaf early. Where
    a pruned node has one child left, that is all there is to find below it, by its own side's gate.

    Args:
      logits: (level, places int32 [T, P]) -> decision logits float32 [T, P].
      layout: of the layer.
      n_tokens: T.
      right_TPH: the hashed sides of the first `hash_levels`, which all go.
    """
    spec, roots_TP = layout.spec, layout.roots(n_tokens)
    kept = [(jnp.ones(roots_TP.shape, jnp.float32), roots_TP)]
    for level in range(spec.shape.depth):
        if right_TPH is not None and level < spec.hash_levels:
            kept = [(gate, layout.child(level, place, right_TPH[..., level])) for gate, place in kept]
            continue
        found = []
        for gate, place in kept:
            r_TP, only = logits(level, place), layout.only_right(level, place)
            for right in (False, True):
                right_TP = jnp.full(place.shape, right)
                child_gate_TP = child_gate(gate, towards(r_TP, right_TP, spec), spec)
                if only is not None:
                    is_only, is_right = only
                    child_gate_TP = jnp.where(is_only & (is_right != right), -1.0, child_gate_TP)
                found.append((child_gate_TP, layout.child(level, place, right_TP)))
        kept = _largest(found, spec.beam) if level + 1 < spec.shape.depth else found
    # Of the last level the best alone is wanted, and by a gather: it ends what XLA would otherwise compute
    # again for every unit that asks whether it is on the path.
    gate_TPK, place_TPK = (jnp.stack(values, axis=-1) for values in zip(*kept))
    best_TP1 = gate_TPK.argmax(axis=-1, keepdims=True)
    return jnp.take_along_axis(place_TPK, best_TP1, axis=-1, mode="clip")[..., 0]


def _largest(pairs: list, n: int) -> list:
    """The n (gate, place) of the largest gates, largest first, elementwise: n passes of a bubble sort.

    All is elementwise, so that it becomes one kernel; `lax.top_k` of a few numbers a row is none.
    """
    pairs = list(pairs)
    for first in range(min(n, len(pairs))):
        for i in range(len(pairs) - 1, first, -1):
            (gate, place), (other_gate, other_place) = pairs[i - 1], pairs[i]
            swap = other_gate > gate
            pairs[i - 1] = jnp.where(swap, other_gate, gate), jnp.where(swap, other_place, place)
            pairs[i] = jnp.where(swap, gate, other_gate), jnp.where(swap, place, other_place)
    return pairs[:n]


def _at(r_TPR, node_TP, spec: TreeSpec):
    # mode="clip": nodes are in range by construction, and clip costs no compare.
    if isinstance(spec, PrunedSpec):
        return jnp.take_along_axis(r_TPR[:, 0], node_TP, axis=-1, mode="clip")
    return jnp.take_along_axis(r_TPR, node_TP[..., None], axis=-1, mode="clip")[..., 0]


def hashed(token_T: jax.Array, salt: jax.Array, n: int) -> jax.Array:
    """A number below n for every id: an integer mixed until all its bits depend on all, mod n.

    Args:
      token_T: integer ids, of a shape that goes with that of `salt`.
      salt: integers; another salt is another hash.
      n: how many numbers there are.

    Source: the finaliser of MurmurHash3 (Appleby, public domain).
    """
    h = token_T.astype(jnp.uint32) ^ salt.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
    h = h ^ (h >> jnp.uint32(16))
    return (h % jnp.uint32(n)).astype(jnp.int32)


def hashed_sides(params: dict, spec: TreeSpec, token_T: jax.Array | None) -> jax.Array | None:
    """Which way tokens go at the first H = `hash_levels`, right where true: bool [T, P, H]; None if H = 0.

    The node they reach is a hash of the token's id, another one in every tree; the sides are its bits.

    Raises:
      InputError: there are no ids.
    """
    if not spec.hash_levels:
        return None
    if token_T is None:
        raise InputError("token_T: is missing; hash_levels decide by the ids of the tokens.")
    place_TP = hashed(token_T[:, None], params["salt"][None], 2**spec.hash_levels)
    return (place_TP[..., None] >> jnp.arange(spec.hash_levels - 1, -1, -1)[None, None]) & 1 == 1


def leaves(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T: jax.Array | None = None) -> jax.Array:
    """Places in the bottom level that tokens reach: int32 [T, P], of a pruned layer over all its trees.

    Args:
      params, x_TE, spec: of the layer.
      token_T: int32 ids of the tokens, which `hash_levels` read.
    """
    right_TPH = hashed_sides(params, spec, token_T)
    # Hashed paths ask no router; the compiler drops the product that none reads.
    return walk(decision_logits(params, x_TE, spec), spec, right_TPH, layout_of(spec, params))


def balance_update(threshold_PN: jax.Array, leaf_TP: jax.Array, spec: TreeSpec) -> jax.Array:
    """Thresholds after one step of sign balancing.

        threshold += balance_rate * sign(visits right - visits left)
                     where min(visits right, visits left) < balance_floor (visits right + visits left)

    A node that sends most tokens right gets a higher threshold, so fewer go
    right next time. Nodes of the bottom level decide nothing and stay.

    Args:
      threshold_PN: thresholds in heap order.
      leaf_TP: int32 leaves of the step's tokens.
      spec: `balance`, `balance_rate` and `balance_floor` are read; `none` changes nothing.

    Source: the bias rule of auxiliary-loss-free balancing (arXiv 2408.15664),
    applied to the two children of a node.
    """
    counts = usage.leaf_counts(leaf_TP, spec.shape.n_leaves)
    return balance_by_counts(threshold_PN, counts, spec)


def balance_by_counts(threshold_PN: jax.Array, counts_PJ: jax.Array, spec: TreeSpec) -> jax.Array:
    """`balance_update` from leaf counts int32 [P, 2^D] (of several micro-batches, say)."""
    if spec.balance == "none" or spec.shape.depth == 0:
        return threshold_PN
    visits_PN = usage.node_counts(counts_PJ)
    step = balance_step(visits_PN[:, 1::2], visits_PN[:, 2::2], spec).astype(threshold_PN.dtype)
    return threshold_PN.at[:, : spec.shape.n_deciding].add(step)


def balance_step(left: jax.Array, right: jax.Array, spec: TreeSpec) -> jax.Array:
    """What sign balancing adds to the thresholds of nodes with these visits of their children: float32."""
    # In float32: their sum times 1/2 is exact up to 2^24 visits.
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    is_lean = jnp.minimum(left, right) < spec.balance_floor * (left + right)
    return jnp.where(is_lean, spec.balance_rate * jnp.sign(right - left), 0.0)
