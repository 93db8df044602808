"""The paper's second table: 1.3B parameters from scratch. A plan: what it needs is printed, not trained.

    python -m experiments.train --config=configs/t2_1p3b.py:row=tree_hard_P32_W1 --describe
    python -m experiments.plan --config=configs/t2_1p3b.py:row=dense --topology=v5e-8 --search
    python -m experiments.train --config=configs/t2_1p3b.py:row=tree_hard_P32_W1 --config.data.files=... \\
        --config.data.tokenizer=... --config.mesh.model=8 --workdir=runs/t2                # the run itself

The paper trains OPT-1.3B's size on 26 G tokens from scratch; its trees stay below dense there, in part.
Not known: text, optimizer, batches, trees, context, and all values. Fine-tuning from pretrained weights,
which it also reports, is another budget and no part of this table.

Here: opt_1.3b (24 layers of width 2048, context 2048), an embedding of OPT's 50,272 rows, trees of depth 7
with F = 8,160 and A = 256 (3.1 %): 32 of single units, or one of 32 a node. Batches of 1,048,576 tokens,
24,800 steps: 26.0 G tokens. Learning rate 2e-4, OPT's own for this size (Zhang et al. 2022, arXiv
2205.01068, table 1), not tuned.

Not run: 6 x parameters x tokens is 2e20 operations for dense, some 140 hours of one H100 at 40 % of its
bfloat16 rate. Needed memory: --describe counts weights and optimizer, experiments.plan the whole step;
what it said is in docs/reproduction.md.
"""

from configs import common

MANY, ONE = {"n_trees": 32, "node_width": (1,)}, {"n_trees": 1, "node_width": (32,)}

ROWS = {
    "dense": {"kind": "dense", "width": 8160},  # F and A of the trees
    "narrow_A256": {"kind": "narrow", "width": 256},
    "tree_hard_P32_W1": {"kind": "tree", **MANY},
    "tree_hard_P1_W32": {"kind": "tree", **ONE, "implementation": "grouped"},
    "leaf_X512_K16": {"kind": "leaf"},
}


def get_config(arg=None):
    """Arguments: row (one of ROWS), seed."""
    arg = common.parse_arg(arg, row="tree_hard_P32_W1", seed=0)
    common.check_known(arg, row=ROWS)
    config = common.base_config()
    config.seed = arg.seed

    config.model.preset = "opt_1.3b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.vocab_multiple = 50272  # OPT's embedding, whichever tokenizer of up to so many tokens

    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value

    config.data.corpus = "named"

    config.train.batch_size, config.train.grad_accum_steps = 512, 64  # 16,384 tokens at a time
    config.train.steps = 24_800
    config.train.eval_every = config.train.checkpoint_every = 500

    config.optim.lr = 2e-4
    config.optim.warmup_share = 0.02
    return config
