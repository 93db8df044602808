"""The paper's second table: 1.3B parameters from scratch. A plan: what it needs is printed, not trained.

    python -m experiments.train --config=configs/t2_1p3b.py:row=tree_hard_P32_W1 --describe
    python -m experiments.plan --config=configs/t2_1p3b.py:row=dense --topology=v5e-8 --search
    python -m experiments.train --config=configs/t2_1p3b.py:row=tree_hard_P32_W1 --config.data.files=... \\
        --config.data.tokenizer=... --config.mesh.model=8 --workdir=runs/t2                # the run itself

The paper trains OPT-1.3B's size on 26 G tokens from scratch; its trees stay below dense there, in part.
Not known: text, optimizer, batches, trees, context, and all values. Fine-tuning from pretrained weights,
which it also reports, is another budget and no part of this table.

Here: configs/scale.py at opt_1.3b (24 layers of width 2048, context 2048; batches of 1,048,576 tokens, 24,796
steps: 26.0 G tokens; OPT's rate, not tuned), with trees of depth 7, F = 8,160 and A = 256 (3.1 %): 32 of
single units, or one of 32 a node.

Not run: 6 x parameters x tokens is 2e20 operations for dense, some 140 hours of one H100 at 40 % of its
bfloat16 rate. Needed memory: --describe counts weights and optimizer, experiments.plan the whole step;
what it said is in docs/reproduction.md.
"""

from configs import common, scale

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
    config = scale.get_config(f"preset=opt_1.3b,chips=2,seed={arg.seed}")  # 16,384 tokens at a time
    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value
    return config
