"""Decisions and paths: how a token finds its way down a tree.

The decision logit of node n is r[n] = z[n, 0] - threshold[n], the pre-activation
of the node's first unit against a threshold that no optimizer touches. A token
goes right where r > 0; ties and NaN go left. The path is always hard; `routing`
says only how decisions learn and how a path's units are weighted (`gates`).
"""

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.tree.gates import child_gate, gate_norm, towards
from tree_ffn.tree.layout import Layout, layout_of
from tree_ffn.tree.products import pre_activations
from tree_ffn.tree.spec import PrunedSpec, TreeSpec


def surrogate_slope(r: jax.Array, beta: float) -> jax.Array:
    """Derivative that straight-through routing gives a decision: beta s'(beta r), s the logistic function."""
    s = jax.nn.sigmoid(beta * r)
    return beta * s * (1 - s)


def decision_logits(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """Decision logits of all deciding nodes: float32 [T, P, R], without gradient.

    One small product over the R = 2^D - 1 routers of every tree; the way to
    route many tokens when only the leaves are wanted. Of a pruned layer, [T, 1, R]
    over its R kept deciding nodes, all trees together.
    """
    return jax.lax.stop_gradient(logits_of(params, x_TE, spec))


def logits_of(params: dict, x_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """`decision_logits` with a gradient to routers and tokens; thresholds have none."""
    layout = layout_of(spec)
    params = layout.stacked(params)
    if spec.router == "frozen":
        w_PRE = params["router"]["w"]
        b_PR = jnp.zeros(w_PRE.shape[:2], jnp.float32)
    else:
        w_PRE, b_PR = (layout.first_units(params[name], axis=1) for name in ("w_in", "b_in"))
    return above_threshold(pre_activations(x_TE, w_PRE, b_PR), params, layout)


def above_threshold(z_TPR: jax.Array, params: dict, layout: Layout) -> jax.Array:
    """Decision logits r = z - threshold of the deciding nodes' first units, [T, P, R]."""
    threshold_PR = params["threshold"][:, : layout.n_deciding].astype(jnp.float32)
    return z_TPR - jax.lax.stop_gradient(threshold_PR)[None]


def renormalised(
    s_TE: jax.Array, params: dict, x_TE: jax.Array, place_TP: jax.Array, spec: TreeSpec
) -> jax.Array:
    """The sum of trees over the norm of their leaves' gates, where the layer says so: `TreeSpec.renormalise`.

    Args:
      s_TE: float32, sum of the trees with gates as they are.
      params, x_TE, spec: of the layer.
      place_TP: places in the bottom level that tokens reach, as `leaves` gives them.
    """
    if not spec.renormalise:
        return s_TE
    layout = layout_of(spec, params)
    logits, gate_TP = gathered(logits_of(params, x_TE, spec), layout), jnp.ones(place_TP.shape, jnp.float32)
    for level in range(spec.hash_levels, spec.shape.depth):
        r_TP = logits(level, layout.ancestor(level, place_TP))
        gate_TP = child_gate(gate_TP, towards(r_TP, layout.goes_right(level, place_TP), spec), spec)
    return s_TE / gate_norm(gate_TP, spec.gate_norm)


def gathered(r_TPR: jax.Array, layout: Layout):
    """The (level, places) -> decision logits that `walk` asks for, out of those of all deciding nodes."""

    def logits(level: int, place_TP: jax.Array) -> jax.Array:
        node_TP = layout.node_starts[level] + place_TP
        # mode="clip": nodes are in range by construction, and clip costs no compare.
        if isinstance(layout.spec, PrunedSpec):
            return jnp.take_along_axis(r_TPR[:, 0], node_TP, axis=-1, mode="clip")
        return jnp.take_along_axis(r_TPR, node_TP[..., None], axis=-1, mode="clip")[..., 0]

    return logits


def walk(logits, layout: Layout, n_tokens: int, right_TPH: jax.Array | None = None) -> jax.Array:
    """Places in the bottom level that tokens reach: int32 [T, P], of a pruned layer over all its trees.

    Args:
      logits: (level, places int32 [T, P]) -> decision logits float32 [T, P], e.g. `gathered`.
      layout: of the layer; of a pruned one, with its structure.
      n_tokens: T.
      right_TPH: the hashed sides of the first `hash_levels`, which read no logits.
    """
    if layout.spec.beam > 1:
        return search(logits, layout, n_tokens, right_TPH)[0]
    place_TP = layout.roots(n_tokens)
    for level in range(layout.spec.shape.depth):
        if right_TPH is not None and level < layout.spec.hash_levels:
            right_TP = right_TPH[..., level]
        else:
            right_TP = logits(level, place_TP) > 0
        place_TP = layout.child(level, place_TP, right_TP)
    return place_TP


def search(
    logits, layout: Layout, n_tokens: int, right_TPH: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The leaf of the largest gate that a beam finds: its place in the bottom level, int32, and gate: [T, P].

    Of every level the `beam` nodes of the largest gates are kept, of equal ones those whose parents' gates
    are larger, and of one parent's the left one:

        g(child) = g(node) c(r) on the right, g(node) c(-r) on the left,    c the logistic function of kappa r

    It differs from going down node by node where a token would turn away from the likelier leaf early. Where
    a pruned node has one child left, that is all there is to find below it, by its own side's gate.

    Args: those of `walk`.
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
    best = lambda value_TPK: jnp.take_along_axis(value_TPK, best_TP1, axis=-1, mode="clip")[..., 0]
    return best(place_TPK), best(gate_TPK)


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


def check_ids(token_T: jax.Array, n_tokens: int) -> None:
    """Raises InputError unless there is one whole number for every token."""
    if token_T.shape != (n_tokens,) or not jnp.issubdtype(token_T.dtype, jnp.integer):
        raise InputError(
            f"token_T: shape {token_T.shape} and dtype {token_T.dtype} are not allowed; use the ids of the "
            f"{n_tokens} tokens, int32 [{n_tokens}]."
        )


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
    layout = layout_of(spec, params)
    return walk(gathered(decision_logits(params, x_TE, spec), layout), layout, x_TE.shape[0], right_TPH)
