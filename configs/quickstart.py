"""What `make quickstart` trains: two layers on the bytes of Python's standard library, about a minute a kind.

    python -m experiments.quickstart                 # both kinds, one table
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/tree
    python -m experiments.train --config=configs/quickstart.py:kind=narrow --workdir=runs/narrow

A tree layer has F = 510 units, of which A = 16 (3.1 %) work for a token; `narrow` is dense with 16,
`dense` with 510.
"""

from configs import common

# The best learning rate of each kind, of a grid around it.
LR = {"dense": 3e-3, "narrow": 3e-3, "moe": 3e-3, "tree": 3e-3, "random_tree": 3e-3}


def get_config(arg=None):
    """Arguments: kind (of the feed-forward layers), steps, seed."""
    arg = common.parse_arg(arg, kind="tree", steps=700, seed=0)
    config = common.base_config()
    config.seed = arg.seed

    model = config.model
    model.n_layers, model.width, model.n_heads, model.context = 2, 128, 4, 128

    ffn = config.ffn
    ffn.kind = arg.kind
    ffn.n_trees, ffn.depth, ffn.node_width = 1, 7, (2,)
    ffn.routing, ffn.gate, ffn.kappa = "continuous", "min", 1.0

    config.data.format = "memory"  # 11 MB: a NumPy file opens at once

    config.train.batch_size, config.train.steps = 16, arg.steps
    config.train.log_every = max(1, arg.steps // 14)
    config.train.eval_every = config.train.checkpoint_every = 0  # at the end only
    config.train.eval_batches = 100

    config.optim.lr = LR.get(arg.kind, 3e-3)
    config.optim.warmup = arg.steps // 10
    config.optim.final_share = 0.05
    return config
