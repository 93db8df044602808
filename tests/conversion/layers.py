"""Small dense layers to convert, and what they may become."""

import math

import numpy as np

from tree_ffn.conversion.convert import path_layer
from tree_ffn.tree import LeafSpec, TreeShape

WIDTH = 8
SHAPE = TreeShape(n_trees=2, depth=2, node_width=(1, 2, 2))
PATHS, SPENT = path_layer(SHAPE), path_layer(SHAPE, "spent")
LEAVES = LeafSpec(n_experts=8, expert_width=4, top_k=3, gate_norm="rms")
GROVE = LeafSpec(n_experts=16, expert_width=2, top_k=5, n_trees=2, gate_norm="l1")


def dense_layer(rng, n_units: int) -> dict:
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"w_in": normal(n_units, WIDTH), "b_in": normal(n_units), "w_out": normal(n_units, WIDTH),
            "b_out": normal(WIDTH)}  # fmt: skip


def gelu(z):
    return z * (1 + np.vectorize(math.erf)(z / np.sqrt(2))) / 2


def dense_output(dense: dict, x, act=gelu) -> np.ndarray:
    """Of the dense layer, in float64."""
    w_in, b_in, w_out, b_out = (np.float64(dense[name]) for name in ("w_in", "b_in", "w_out", "b_out"))
    return act(np.float64(x) @ w_in.T + b_in) @ w_out + b_out


def clustered_layer(rng, n_groups=4, per_group=4):
    """Units that work for one group of tokens only; tokens of that group, in random order."""
    centres = 4 * np.eye(n_groups, WIDTH, dtype=np.float32)
    group = np.repeat(np.arange(n_groups), per_group)
    order = rng.permutation(len(group))
    dense = dense_layer(rng, len(group))
    dense["w_in"] = (centres[group] + 0.3 * rng.standard_normal((len(group), WIDTH)))[order].astype(
        np.float32
    )
    dense["b_in"] = np.full(len(group), -6, np.float32)
    tokens = lambda n: (centres[rng.integers(0, n_groups, n)] + 0.3 * rng.standard_normal((n, WIDTH))).astype(
        np.float32
    )
    return dense, tokens(512), tokens(256)
