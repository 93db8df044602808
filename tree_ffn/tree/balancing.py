"""Sign balancing: thresholds that move until both children of a node have tokens, without another loss."""

import jax
import jax.numpy as jnp

from tree_ffn.tree import usage
from tree_ffn.tree.spec import TreeSpec


def balance_update(threshold_PN: jax.Array, leaf_TP: jax.Array, spec: TreeSpec) -> jax.Array:
    """Thresholds after one step of sign balancing.

        threshold += balance_rate * sign(visits right - visits left)

    A node that sends most tokens right gets a higher threshold, so fewer go
    right next time. Nodes of the bottom level decide nothing and stay.

    Args:
      threshold_PN: thresholds in heap order.
      leaf_TP: int32 leaves of the step's tokens.
      spec: `balance` and `balance_rate` are read; `none` changes nothing.

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
    return spec.balance_rate * jnp.sign(right - left).astype(jnp.float32)
