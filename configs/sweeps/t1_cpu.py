"""All rows of configs/t1_cpu.py, one seed each; a small grid of learning rates for each with --tune."""

from configs.t1_cpu import ROWS


def get_sweep():
    """The sweep as plain data."""
    return {
        "config": "configs/t1_cpu.py",
        "table": "t1_small",
        "rows": {name: {"set": {"row": name}} for name in ROWS},
        "tuning": {"key": "optim.lr", "values": [3e-3, 6e-3, 1.2e-2], "set": {"length": "tune"}},
    }
