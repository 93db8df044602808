"""Dense, narrow, a mixture of experts and trees of configs/t1.py, three seeds; not run by us."""

KINDS = ("dense", "narrow_A96", "moe_top1_X32", "tree_hard_P12_W1")


def get_sweep():
    """The sweep as plain data."""
    return {
        "config": "configs/t1.py",
        "table": "t1_small",
        "seeds": [0, 1, 2],
        "rows": {name: {"set": {"row": name}} for name in KINDS},
        "tuning": {"key": "optim.lr", "values": [3e-4, 6e-4, 1.2e-3], "set": {"length": "tune"}},
    }
