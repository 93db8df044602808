"""All rows of configs/t1_small.py: 11 kinds x 3 seeds; with --tune learning rates for each before."""

from configs.t1_small import ROWS


def get_sweep():
    """The sweep as plain data."""
    return {
        "config": "configs/t1_small.py",
        "table": "t1_small",
        "seeds": [0, 1, 2],
        "rows": {name: {"set": {"row": name}} for name in ROWS},
        "tuning": {
            "key": "optim.lr",
            "values": [7.5e-4, 1.5e-3, 3e-3],
            "set": {"length": "tune", "train.eval_every": 0},
        },
    }
