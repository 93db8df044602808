"""The paper's first table at a scale that minutes allow: language modelling at equal active width.

    python -m experiments.train --config=configs/t1_small.py:row=tree_hard_P12_W1,seed=0 \\
        --config.data.files='TEXT/wikipedia2015/train_0[0-3].txt.xz,TEXT/novels/train_00.txt.xz' \\
        --config.data.valid_files=TEXT/wikipedia2015/valid.txt.xz \\
        --config.data.tokenizer=TEXT/tokenizers/gpt2/encoder.json.xz,TEXT/tokenizers/gpt2/vocab.bpe.xz \\
        --workdir=runs/tree_hard --results=results/t1_small.jsonl --table=t1_small --row=tree_hard_P12_W1

The paper compares dense OPT-125M with trees trained on the same tokens, three seeds; its budget, trees,
learning rates and table values are not known to us. Here: 8 layers of width 768, context 512, GPT-2's BPE,
60 M tokens seen (44 M of them unique), F of about 3,072 units, and A = 96 (3.1 %) in every sparse row and
in `narrow`.

A run takes 2 to 5 minutes on one H100 or H200 (docs/results/t1_small.md).
"""

from configs import common

MANY, ONE = ({"n_trees": p, "node_width": (w,)} for p, w in ((12, 1), (1, 12)))
# Mixtures of experts, without a dense start, as the paper's trees are: gates as they are, balanced.
MIXTURE = {
    "kind": "leaf", "router": "softmax", "gate_norm": "none", "balance_rate": 1e-3, "dense_start": 0.0,
}  # fmt: skip

ROWS = {
    "dense": {"kind": "dense", "width": 3060},  # F and A of the trees
    "narrow_A96": {"kind": "narrow", "width": 96},
    "moe_top1_X32": {**MIXTURE, "n_experts": 32, "expert_width": 96, "top_k": 1},
    "moe_top4_X128": {**MIXTURE, "n_experts": 128, "expert_width": 24, "top_k": 4},
    "random_tree_P12_W1": {"kind": "random_tree", **MANY},
    "tree_hard_P12_W1": {"kind": "tree", **MANY},
    "tree_hard_P1_W12": {"kind": "tree", **ONE, "implementation": "grouped"},
    "tree_straight_P12_W1": {"kind": "tree", **MANY, "routing": "straight_through"},
    "leaf_X512_K16": {"kind": "leaf"},
}

# Steps of 32,768 tokens: 60 M tokens, the 15 M by which learning rates are chosen, and 30 and 120 M.
STEPS = {"full": 1831, "tune": 458, "half": 916, "double": 3662}


def get_config(arg=None):
    """Arguments: row (one of ROWS), length (a name of STEPS), seed."""
    arg = common.parse_arg(arg, row="tree_hard_P12_W1", length="full", seed=0)
    common.check_known(arg, row=ROWS, length=STEPS)
    config = common.base_config()
    config.seed = arg.seed

    model = config.model
    model.n_layers, model.width, model.n_heads, model.max_seq_len = 8, 768, 12, 512
    model.dtype = "bfloat16"
    model.vocab_multiple = 64

    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value

    config.data.corpus = "named"

    config.train.batch_size, config.train.steps = 64, STEPS[arg.length]
    config.train.eval_every, config.train.eval_batches = 200, 0
    config.train.checkpoint_every = 0  # at the end only

    config.optim.lr = 1.5e-3
    config.optim.final_share = 0.05
    return config
