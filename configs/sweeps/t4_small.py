"""All rows of configs/t4_small.py: 22 of trees; 28 runs.

`--sweep=configs/sweeps/t4_small.py:ends=true` adds dense and narrow, of three seeds each, so that the
table has a gap to close.
"""

from configs import common

HARD = {
    "node": ("gelu", "relu", "relu2", "silu", "identity", "abs", "tanh"),
    "sum": ("gelu", "relu", "tanh", "abs"),
}
BALANCES = ("none", "sign")

# Where three seeds say how much a row's figures mean: the paper's two placements, and no activation at all.
EXTREMES = {("gelu", "node", "none"), ("identity", "node", "none"), ("gelu", "sum", "none")}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: ends (add dense and narrow), seeds (of the extremes)."""
    arg = common.parse_arg(arg, ends=False, seeds=3)
    points = [("hard", act, site, bal) for site in HARD for act in HARD[site] for bal in BALANCES]
    rows = {}
    for routing, activation, site, balance in points:
        kind = f"tree_{routing}_P12_W1_{activation}_{site}"
        extreme = (activation, site, balance) in EXTREMES
        rows[f"{kind}_{balance}"] = {
            "set": {"activation": activation, "site": site, "routing": routing, "balance": balance},
            "seeds": list(range(arg.seeds)) if extreme else [0],
            "kind": kind,  # balanced or not, one learning rate
        }
    if arg.ends:
        ends = {"dense": "dense", "narrow_A96": "narrow"}
        rows |= {
            name: {"set": {"routing": end}, "seeds": list(range(arg.seeds))} for name, end in ends.items()
        }
    return {
        "config": "configs/t4_small.py",
        "table": "t4_small",
        "rows": rows,
        "tuning": {
            "key": "optim.lr",
            "values": [7.5e-4, 1.5e-3, 3e-3],
            "set": {"length": "tune", "train.eval_every": 0},
        },
    }
