"""How much of a tree is used, and how fast that changes: counts and metrics from leaf ids alone."""

import functools
import math

import jax
import jax.numpy as jnp


def leaf_counts(leaf_TP: jax.Array, n_leaves: int) -> jax.Array:
    """Visits of every leaf: int32 [P, 2^D].

    Args:
      leaf_TP: int32 [T, P], the leaf each token reached in each tree; -1 counts nowhere.
      n_leaves: 2^D.

    Example:
      >>> leaf_counts(jnp.array([[0], [3], [-1], [3]]), 4).tolist()
      [[1, 0, 0, 2]]
    """
    # A scatter-add meets the same bins again and again, one after the other.
    if n_leaves <= 64:  # every bin asks every token: cheap in one pass over the leaves, as a GPU makes of it
        return (leaf_TP[..., None] == jnp.arange(n_leaves)[None, None]).sum(axis=0, dtype=jnp.int32)
    # A product of two one-hot matrices, of quotient and remainder. Exact up to 2^24 tokens.
    radix = math.isqrt(n_leaves - 1) + 1
    digits = ((leaf_TP // radix, -(-n_leaves // radix)), (leaf_TP % radix, radix))
    high, low = ((digit[..., None] == jnp.arange(n)[None, None]).astype(jnp.float32) for digit, n in digits)
    counts_PHL = jnp.einsum("TPH,TPL->PHL", high, low)
    return counts_PHL.astype(jnp.int32).reshape(leaf_TP.shape[1], -1)[:, :n_leaves]


def visit_counts(leaf_TP: jax.Array, n_trees: int, n_leaves: int) -> jax.Array:
    """`leaf_counts` of a layer or of stacked ones, int32 [P, J] or [layers, P, J].

    Args:
      leaf_TP: int32 [T, P] or [layers, T, P].
      n_trees: P; 1: the K experts of a token count alike.
      n_leaves: J.
    """
    if n_trees == 1:
        leaf_TP = leaf_TP.reshape(*leaf_TP.shape[:-2], -1, 1)
    count = functools.partial(leaf_counts, n_leaves=n_leaves)
    return jax.vmap(count)(leaf_TP) if leaf_TP.ndim == 3 else count(leaf_TP)


def counts_by_level(counts_J):
    """Visits of the nodes of every level, [..., 2^l] each, root first, from those of the leaves, [..., 2^D].

    Args:
      counts_J: of JAX or NumPy; the results are of the same.

    Example:
      >>> [level.tolist() for level in counts_by_level(jnp.array([1, 0, 0, 2]))]
      [[3], [1, 2], [1, 0, 0, 2]]
    """
    levels = [counts_J]
    while levels[0].shape[-1] > 1:
        below = levels[0]
        levels.insert(0, below[..., 0::2] + below[..., 1::2])
    return levels


def node_counts(counts_PJ: jax.Array) -> jax.Array:
    """Visits of every node in heap order, [P, N], from those of the leaves, [P, 2^D].

    Example:
      >>> node_counts(jnp.array([[1, 0, 0, 2]])).tolist()
      [[3, 1, 2, 1, 0, 0, 2]]
    """
    return jnp.concatenate(counts_by_level(counts_PJ), axis=1)


def sides(counts_PJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Visits of the left and of the right child of every deciding node: each [P, 2^D - 1], heap order.

    Example:
      >>> left, right = sides(jnp.array([[1, 0, 0, 2]]))
      >>> left.tolist(), right.tolist()
      ([[1, 1, 0]], [[2, 0, 2]])
    """
    visits_PN = node_counts(counts_PJ)
    return visits_PN[:, 1::2], visits_PN[:, 2::2]


def by_level(values_N):
    """Values of nodes in heap order, [..., 2^L - 1], as one array [..., 2^l] a level; of JAX or NumPy."""
    n_levels = (values_N.shape[-1] + 1).bit_length() - 1
    return [values_N[..., 2**level - 1 : 2 ** (level + 1) - 1] for level in range(n_levels)]


def moved(leaf_TP: jax.Array, before_TP: jax.Array, depth: int) -> jax.Array:
    """Share of tokens that stand at another node than before, at every level: float32 [P, D + 1].

    Level 0 is the root, where nothing can move; level D is the leaf.

    Args:
      leaf_TP: int32 leaves.
      before_TP: leaves of the same tokens, by other weights.
      depth: D.

    Example:
      >>> moved(jnp.array([[0], [3]]), jnp.array([[0], [0]]), depth=2).tolist()
      [[0.0, 0.5, 0.5]]
    """
    above = (depth - jnp.arange(depth + 1, dtype=leaf_TP.dtype))[None, None]
    other = (leaf_TP[..., None] >> above) != (before_TP[..., None] >> above)
    return jnp.mean(other.astype(jnp.float32), axis=0)


def metrics(counts_PJ: jax.Array) -> dict[str, jax.Array]:
    """Usage of one layer in a few numbers, each a float32 scalar.

    - `dead_leaves`: share of leaves without a visit. (The name means what it
      says only after 1,000 * 2^D tokens or more.)
    - `leaf_entropy`: entropy of the visits over a tree's leaves in bits, divided
      by D, mean over trees: 1 is balanced, 0 is one leaf; 0 by definition at D = 0.
    - `constant_decisions`: share of decisions, weighted by visits, made at nodes
      that sent every token the same way.
    - `right_share`: share of all decisions that went right.
    - `skew`: sum over nodes of |right - left| over that of right + left: 0 where
      every node halves its tokens, 1 where every decision is constant.

    Args:
      counts_PJ: int [P, 2^D] visits.
    """
    n_leaves = counts_PJ.shape[1]
    counts = counts_PJ.astype(jnp.float32)
    dead = jnp.mean((counts_PJ == 0).astype(jnp.float32))
    depth = n_leaves.bit_length() - 1
    if depth == 0:
        zero = jnp.zeros((), jnp.float32)
        names = ("leaf_entropy", "constant_decisions", "right_share", "skew")
        return {"dead_leaves": dead, **dict.fromkeys(names, zero)}
    share = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    bits = -jnp.sum(jnp.where(share > 0, share * jnp.log2(jnp.where(share > 0, share, 1.0)), 0.0), axis=1)
    left, right = sides(counts)
    decisions = left + right
    all_decisions = jnp.maximum(decisions.sum(), 1.0)
    constant = jnp.where(jnp.minimum(left, right) == 0, decisions, 0.0)
    return {
        "dead_leaves": dead,
        "leaf_entropy": jnp.mean(bits) / depth,
        "constant_decisions": constant.sum() / all_decisions,
        "right_share": right.sum() / all_decisions,
        "skew": jnp.abs(right - left).sum() / all_decisions,
    }
