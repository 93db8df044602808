"""The paper's first table at its own size: language modelling at 125M, dense against trees, three seeds.

    python -m experiments.ablate --sweep=configs/sweeps/t1.py --workdir=runs/t1 --results=results/t1.jsonl \\
        --set=data.files='TEXT/train_*.txt.xz' --set=data.valid_files=TEXT/valid.txt.xz \\
        --set=data.tokenizer=TEXT/vocab.json,TEXT/merges.txt --tune --gpus=0,1,2,3,4,5,6,7
    python -m experiments.train --config=configs/t1.py:row=tree_hard_P12_W1,seed=0 --config.data.files=... \\
        --config.data.tokenizer=... --workdir=runs/tree --results=results/t1.jsonl --table=t1_small \\
        --row=tree_hard_P12_W1                                                          # one row
    python -m experiments.train --config=configs/t1.py --describe
    python -m experiments.plan --config=configs/t1.py                                   # memory of its step

The paper compares dense models of OPT-125M's size with trees of less than 5 % active units, three seeds.
Not known of its setting: the text, the budget, optimizer, learning rates and batches, the trees' number
and depth, biases, the dense rows' activation (OPT's is ReLU), and every value of the table. So this is our
setting of that comparison, not its repetition.

Here: opt_125m (12 layers of width 768, context 2048) with an embedding of OPT's 50,272 rows, 12 trees of
depth 7 a layer (F = 3,060, A = 96: 3.1 %), batches of 524,288 tokens, 4,800 steps: 2.5 G tokens, 20 a
parameter. `narrow` is dense with 96 units; it is what a sparse layer has to beat. The learning rate is
OPT's own for this size (6e-4; Zhang et al. 2022, arXiv 2205.01068, table 1) until --tune has chosen one.

Not run by us. Expected numbers: none are known. Time: by the rate of opt_125m in results/speed_train.jsonl
(context 512, one H100: 164 k tokens/s for dense) a run takes about 4.3 hours on one H100, and the twelve
of dense, narrow, one mixture of experts and one tree about two days, tuning not counted.
"""

from configs import common, t1_small

ROWS = t1_small.ROWS
STEPS = {"full": 4800, "tune": 600}


def get_config(arg=None):
    """Arguments: row (one of ROWS), length (full or tune), seed."""
    arg = common.parse_arg(arg, row="tree_hard_P12_W1", length="full", seed=0)
    common.check_known(arg, row=ROWS, length=STEPS)
    config = common.base_config()
    config.seed = arg.seed

    config.model.preset = "opt_125m"
    config.model.dtype = "bfloat16"
    config.model.vocab_multiple = 50272  # OPT's embedding, whichever tokenizer of up to so many tokens

    for key, value in ROWS[arg.row].items():
        config.ffn[key] = value

    config.data.corpus = "named"

    config.train.batch_size, config.train.grad_accum_steps = 256, 16  # 32,768 tokens at a time
    config.train.steps = STEPS[arg.length]
    config.train.eval_every, config.train.checkpoint_every, config.train.eval_batches = 200, 200, 20

    config.optim.lr = 6e-4
    config.optim.warmup_share = 0.05
    return config
