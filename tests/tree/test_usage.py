"""Counts and figures of usage against plain counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tree_ffn.tree import usage


def counted(leaf, n_leaves):
    return np.stack([np.bincount(column, minlength=n_leaves) for column in leaf.T])


def node_visits(counts):
    """[P, N] by walking every leaf's path up to the root."""
    P, n_leaves = counts.shape
    visits = np.zeros((P, 2 * n_leaves - 1), int)
    for p in range(P):
        for leaf, count in enumerate(counts[p]):
            node = n_leaves - 1 + leaf
            visits[p, node] += count
            while node:
                node = (node - 1) // 2
                visits[p, node] += count
    return visits


@pytest.mark.parametrize("depth", [0, 1, 3, 7, 8])
def test_counts(depth, rng):
    leaf = rng.integers(0, 2**depth, (50, 3), np.int32)
    counts = usage.leaf_counts(jnp.asarray(leaf), 2**depth)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, counted(leaf, 2**depth))
    np.testing.assert_array_equal(jax.jit(usage.node_counts)(counts), node_visits(np.asarray(counts)))


def test_figures(rng):
    counts = rng.integers(0, 40, (3, 8)) * (rng.random((3, 8)) < 0.5)
    counts[:, 0] += 1
    got = jax.jit(usage.metrics)(counts.astype(np.int32))
    share = counts / counts.sum(1, keepdims=True)
    bits = [-sum(s * np.log2(s) for s in row if s > 0) for row in share]
    visits = node_visits(counts)
    decided = constant = 0
    for row in visits:
        for n in range(7):
            decided += row[n]
            constant += row[n] * (row[2 * n + 1] == 0 or row[2 * n + 2] == 0)
    assert float(got["dead_leaves"]) == pytest.approx(np.mean(counts == 0))
    assert float(got["leaf_entropy"]) == pytest.approx(np.mean(bits) / 3, rel=1e-5)
    assert float(got["constant_decisions"]) == pytest.approx(constant / decided, rel=1e-5)


@pytest.mark.parametrize(
    "counts, dead, entropy, constant, right, skew",
    [
        ([[5, 5, 5, 5]], 0.0, 1.0, 0.0, 0.5, 0.0),  # balanced
        ([[0, 0, 9, 0]], 0.75, 0.0, 1.0, 0.5, 1.0),  # one leaf takes all
        ([[4, 0, 4, 0]], 0.5, 0.5, 0.5, 0.25, 0.5),  # the root decides, its children do not
        ([[7]], 0.0, 0.0, 0.0, 0.0, 0.0),  # D = 0: entropy is 0 by definition
        ([[0, 0]], 1.0, 0.0, 0.0, 0.0, 0.0),  # no token at all
    ],
)
def test_figures_by_hand(counts, dead, entropy, constant, right, skew):
    got = {name: float(value) for name, value in jax.jit(usage.metrics)(np.array(counts, np.int32)).items()}
    expected = {"dead_leaves": dead, "leaf_entropy": entropy, "constant_decisions": constant}
    assert got == pytest.approx(expected | {"right_share": right, "skew": skew})


def test_sides_and_levels(rng):
    counts = rng.integers(0, 9, (2, 8))
    visits = node_visits(counts)
    left, right = usage.sides(jnp.asarray(counts, jnp.int32))
    for node in range(7):
        np.testing.assert_array_equal(left[:, node], visits[:, 2 * node + 1])
        np.testing.assert_array_equal(right[:, node], visits[:, 2 * node + 2])
    levels = usage.by_level(jnp.asarray(visits))
    assert [level.shape for level in levels] == [(2, 1), (2, 2), (2, 4), (2, 8)]
    for level in levels:
        np.testing.assert_array_equal(level.sum(axis=1), counts.sum(axis=1))


@pytest.mark.parametrize("depth", [0, 3])
def test_moved_against_paths(depth, rng):
    now, before = rng.integers(0, 2**depth, (2, 40, 3), np.int32)

    def node(leaf, level):
        path = [2**depth - 1 + leaf]
        while path[-1]:
            path.append((path[-1] - 1) // 2)
        return path[::-1][level]

    got = jax.jit(usage.moved, static_argnums=2)(now, before, depth)
    assert got.shape == (3, depth + 1)
    for p in range(3):
        for level in range(depth + 1):
            other = [node(a, level) != node(b, level) for a, b in zip(now[:, p], before[:, p])]
            assert float(got[p, level]) == pytest.approx(np.mean(other))
