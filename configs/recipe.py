"""The recommended layer: 512 small experts behind one tree, of which a token takes the 16 likeliest.

    python -m experiments.train --config=configs/recipe.py --workdir=runs/mine
    python -m experiments.train --config=configs/recipe.py:preset=opt_125m --config.model.dtype=bfloat16 \\
        --config.data.files='TEXT/*.txt.xz' --config.data.tokenizer=tokenizer.json --workdir=runs/125m
    python -m experiments.train --config=configs/recipe.py:kind=narrow --workdir=runs/narrow    # a baseline

An expert has E / 128 units: F = 4 E, A = E / 8. The experts are the leaves of one tree of depth 9 whose nodes
decide by a row of weights each; a token's 16 are those that a search finds which keeps the 16 likeliest nodes
of every level. It asks 95 of the 511 rows: 2 A + 95 products of E numbers a token, 4.7 % of dense's at
E = 768. An expert's gate is its probability over the root of the mean square of the chosen ones'.

In the first fifth of the training experts that are not chosen add something too, with a weight that falls
from 1 to 0 (`ffn.dense_start`). After that, and at inference, a token has its 16 and nothing else.

The rate, Adam's b2 and the first output weights are those that were best at E = 768 with 60 M tokens, of
dense and narrow too (configs/sweeps/leaves.py and fairness.py, docs/quality.md).
"""

from configs import common

BEST = {"leaf": (2.12e-3, 0.2), "dense": (1.5e-3, 1.1308), "narrow": (1.5e-3, 0.05)}


def get_config(arg=None):
    """Arguments: preset (tree_ffn/models/from_config.py), kind (of the feed-forward layers), seed."""
    arg = common.parse_arg(arg, preset="", kind="leaf", seed=0)
    config = common.base_config()
    config.seed = arg.seed
    config.model.preset = arg.preset
    config.ffn.kind = arg.kind
    config.optim.lr, config.model.init.w_out = BEST.get(arg.kind, BEST["narrow"])
    config.optim.b2 = 0.99
    return config
