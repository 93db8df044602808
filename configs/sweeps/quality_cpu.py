"""Attempts to close the gap at the quickstart's size: options of the layer, one seed each, 2 minutes a row.

    python -m experiments.ablate --sweep=configs/sweeps/quality_cpu.py --workdir=runs/quality \\
        --results=runs/quality.jsonl

2 M tokens of a model of two layers find candidates for larger runs and prove nothing. Every row has A = 16;
F = 510, or 383 where routers of one unit stand above wide leaves (thin). One learning rate for all: 3e-3, the
best of every kind in results/t1_cpu_tuning.jsonl.
"""

from configs.sweeps.quality import (
    CONTINUOUS,
    DENSE_START,
    GATED,
    HASH3,
    HASH4,
    LOGISTIC,
    PRODUCT,
    SILENT,
    STRAIGHT,
    apart,
    leak,
)  # fmt: skip

WIDE = {"ffn.n_trees": 1, "ffn.node_width": (2,)}
THIN = {"ffn.n_trees": 1, "ffn.node_width": (1, 1, 1, 1, 1, 11), "ffn.depth": 5}

# Per cent at first, and per cent of the training until it has fallen to nothing.
LEAKS = (
    (100, 10),
    (100, 20),
    (100, 30),
    (50, 30),
    (50, 50),
    (30, 30),
    (30, 50),
    (20, 80),
    (30, 90),
    (40, 90),
)

# The paper's layer, from which the recipe differs.
PLAIN = {
    "layer": "paths", "optim.lr": 3e-3, "model.init.w_out": 0.05,
    "ffn.routing": "hard", "ffn.leak": 0.0, "ffn.leak_share": 0.3,
}  # fmt: skip

ROWS = {
    "dense": {"kind": "dense"},
    "narrow_A16": {"kind": "narrow"},
    "moe_top1_X32": {"kind": "moe"},
    "moe_top1_X32_leak100_20": {"kind": "moe", **DENSE_START},
    "hash_X32": {"kind": "hash"},
    "hash_X32_leak100_20": {"kind": "hash", **DENSE_START},
    "hash_tree_P2_W1": {"kind": "hash_tree"},
    "hash_tree_P1_D5_thin": {"kind": "hash_tree", **THIN},
    "hash_tree_P2_W1_leak100_20": {"kind": "hash_tree", **DENSE_START},
    "tree_continuous_P4_D5_experts_leak100_20": {**GATED, **apart(4, 4, 5, 0), **DENSE_START},
    "tree_continuous_P8_D5_experts_leak100_20": {**GATED, **apart(8, 2, 5, 0), **DENSE_START},
    "tree_continuous_P16_D5_experts_leak100_20": {**GATED, **apart(16, 1, 5, 0), **DENSE_START},
    "tree_straight_P1_D5_thin_hash4_leak100_20": {**STRAIGHT, **THIN, **HASH4, **DENSE_START},
    "tree_straight_P2_W1_hash4": {**STRAIGHT, **HASH4},
    "tree_straight_P1_D5_thin_hash3": {**STRAIGHT, **THIN, **HASH3},
    "tree_straight_P1_D5_thin_hash4": {**STRAIGHT, **THIN, **HASH4},
    "tree_continuous_P1_D5_thin_hash3": {**CONTINUOUS, **THIN, **HASH3},
    "tree_straight_P2_W1": STRAIGHT,
    **{
        f"tree_straight_P2_W1_leak{first}_{share}": {**STRAIGHT, **leak(first / 100, share / 100)}
        for first, share in LEAKS
    },
    "tree_straight_P1_W2": {**STRAIGHT, **WIDE},
    "tree_straight_P1_W2_silent": {**STRAIGHT, **WIDE, **SILENT},
    "tree_straight_P1_D5_thin": {**STRAIGHT, **THIN},
    "tree_straight_P1_D5_thin_silent": {**STRAIGHT, **THIN, **SILENT},
    "tree_continuous_P1_W2": {**CONTINUOUS, **WIDE},
    "tree_continuous_P1_W2_silent": {**CONTINUOUS, **WIDE, **SILENT},
    "tree_continuous_P1_W2_logistic": {**CONTINUOUS, **WIDE, **LOGISTIC},
    "tree_continuous_P1_W2_logistic_product": {**CONTINUOUS, **WIDE, **LOGISTIC, **PRODUCT},
    "tree_continuous_P1_D5_thin_silent_logistic_product": {
        **CONTINUOUS, **THIN, **SILENT, **LOGISTIC, **PRODUCT,
    },
}  # fmt: skip


def get_sweep():
    """The sweep as plain data."""
    return {
        "config": "configs/quickstart.py",
        "table": "quality_attempts",
        "rows": {name: {"set": {**PLAIN, **row}} for name, row in ROWS.items()},
    }
