"""A small comparison on real English that a laptop CPU can repeat: some minutes a row on 2 cores.

    python -m experiments.train --config=configs/cpu_small.py:row=tree_hard \
        --config.data.files='TEXT/train_*.txt.xz' --config.data.valid_files='TEXT/valid.txt.xz' \
        --workdir=runs/tree_hard --results=results/cpu_small.jsonl --row=tree_hard_P2_W1

4 layers of width 128, context 256, bytes. Every sparse row has F of about 510 units and A = 16 (3.1 %);
`narrow` is dense with 16 units, `dense` with 510. The recorded rows were trained on
Wikipedia of 2015 and English novels (results/cpu_small.jsonl names them by sha256).
`length=short` and `length=full` are the budgets of the three-seed rows.
"""

from configs import common
from configs.t1_small import MIXTURE

TREES = {"n_trees": 2, "node_width": (1,)}
ROWS = {
    "dense": {"kind": "dense", "width": 510},
    "narrow": {"kind": "narrow", "width": 16},
    "moe": {**MIXTURE, "n_experts": 32, "expert_width": 16, "top_k": 1},
    "random_tree": {"kind": "random_tree", **TREES},
    "tree_hard": {"kind": "tree", **TREES},
    "tree_straight": {"kind": "tree", **TREES, "routing": "straight_through"},
}

# `full` for a GPU, `long` and `short` for CPUs.
STEPS = {"full": 3000, "long": 2000, "short": 500}

# The best of 1e-3, 2e-3, 4e-3 and 8e-3 for every row at 3,000 steps; at 500 steps dense and moe were best at
# 4e-3 (results/cpu_small_tuning.jsonl, one seed; the grids).
LR = 2e-3
LR_SHORT = {"dense": 4e-3, "moe": 4e-3}


def get_config(arg=None):
    """Arguments: row (one of ROWS), length (full, long or short), seed."""
    arg = common.parse_arg(arg, row="tree_hard", length="long", seed=0)
    common.check_known(arg, row=ROWS, length=STEPS)
    config = common.base_config()
    config.seed = arg.seed

    model = config.model
    model.n_layers, model.width, model.n_heads, model.max_seq_len = 4, 128, 4, 256

    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value

    config.data.corpus = "named"

    config.train.batch_size, config.train.steps = 8, STEPS[arg.length]
    config.train.eval_every = config.train.checkpoint_every = 0  # at the end only
    config.train.eval_batches = 100

    config.optim.lr = LR_SHORT.get(arg.row, LR) if arg.length == "short" else LR
    config.optim.final_share = 0.05
    return config
