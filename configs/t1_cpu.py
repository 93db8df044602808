"""The paper's first table where there is only a CPU: every kind of layer, 5 minutes in all on 2 shared cores.

    python -m experiments.ablate --sweep=configs/sweeps/t1_cpu.py --workdir=runs/t1 --results=runs/t1.jsonl
    python -m experiments.tables --results=runs/t1.jsonl

The paper compares dense decoders with trees of the same F on the same tokens. Here: the model and text of
the quickstart (2 layers of width 128, context 128, the bytes of Python's standard library) for 300 steps of
2,048 tokens; F = 510, and A = 16 (3.1 %) in every sparse row and in `narrow`.

What it can show: that every kind trains, what a row of the table is made of, and differences of some
hundredths of a bit. What it cannot: 0.6 M tokens are too few to rank kinds of layers, let alone to say
something about the paper's sizes; configs/t1_small.py is the smallest config for that.
"""

from configs import common, quickstart
from configs.t1_small import MIXTURE

P2 = {"n_trees": 2, "node_width": (1,)}

ROWS = {
    "dense": {"kind": "dense", "width": 510},  # F and A of the trees
    "narrow_A16": {"kind": "narrow", "width": 16},
    "moe_top1_X32": {**MIXTURE, "n_experts": 32, "expert_width": 16, "top_k": 1},
    "random_tree_P2_W1": {"kind": "random_tree", **P2},
    "tree_hard_P2_W1": {"kind": "tree", "routing": "hard", **P2},
    "tree_straight_P2_W1": {"kind": "tree", "routing": "straight_through", **P2},
    "leaf_X512_K16": {"kind": "leaf"},
}

STEPS = {"full": 300, "tune": 100}


def get_config(arg=None):
    """Arguments: row (one of ROWS), length (full or tune), seed."""
    arg = common.parse_arg(arg, row="tree_hard_P2_W1", length="full", seed=0)
    common.check_known(arg, row=ROWS, length=STEPS)
    kind = ROWS[arg.row]["kind"]
    config = quickstart.get_config(f"kind={kind},steps={STEPS[arg.length]},seed={arg.seed}")
    config.model.init.w_out = 0.05  # one scale for all rows
    # Every row's best of 3e-3, 6e-3, 12e-3 and, as that was an edge, 1.5e-3 (results/t1_cpu_tuning.jsonl).
    config.optim.lr = 3e-3
    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value
    # 143 k tokens: a leaf without a visit in 1,000 * 2^D of them is called dead.
    config.train.eval_batches = 70
    return config
