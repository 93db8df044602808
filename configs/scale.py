"""Models of 125 M to 6.7 G parameters as many chips would train them, with each kind of layer.

    python -m experiments.plan --config=configs/scale.py:preset=opt_6.7b,chips=256 --topology=v5e-256
    python -m experiments.train --config=configs/scale.py:preset=opt_1.3b,chips=16 --config.data.files=... \\
        --config.data.tokenizer=... --workdir=runs/1.3b

OPT's sizes, embedding, rates and batches of 0.5, 1 and 2 M tokens (Zhang et al. 2022, arXiv 2205.01068, table
1), 26 G tokens in all. The rates are tuned for no layer of ours. `kind` is dense, leaf (the recommended
layer), moe (the same experts with a softmax over them) or tree (the paper's path layer). A chip has at most 4
sequences at a time; `plan` says whether that fits.
"""

from configs import common

KINDS = {
    "dense": {"kind": "dense"},
    "leaf": {"kind": "leaf"},
    "moe": {"kind": "leaf", "router": "softmax", "balance_rate": 1e-3},
    "tree": {"kind": "tree"},
}
# Sequences of 2,048 tokens a step, and the learning rate.
STEPS = {"opt_125m": (256, 6e-4), "opt_350m": (256, 3e-4), "opt_1.3b": (512, 2e-4), "opt_2.7b": (512, 1.6e-4),
         "opt_6.7b": (1024, 1.2e-4)}  # fmt: skip
TOKENS, ROWS_A_CHIP = 26e9, 4


def get_config(arg=None):
    """Arguments: preset (one of STEPS), kind (one of KINDS), chips (how many split the batch), seed."""
    arg = common.parse_arg(arg, preset="opt_1.3b", kind="leaf", chips=16, seed=0)
    common.check_known(arg, preset=STEPS, kind=KINDS)
    config = common.base_config()
    config.seed = arg.seed

    config.model.preset = arg.preset
    config.model.dtype = "bfloat16"
    config.model.remat = "none" if arg.preset == "opt_125m" else "full"
    config.model.vocab_multiple = 50272  # OPT's embedding, whichever tokenizer of up to so many tokens
    for key, value in KINDS[arg.kind].items():
        config.ffn[key] = value
    config.data.corpus = "named"

    rows, config.optim.lr = STEPS[arg.preset]
    config.train.batch_size = rows
    config.train.grad_accum_steps = max(1, rows // (ROWS_A_CHIP * arg.chips))
    config.train.steps = round(TOKENS / (2048 * rows))
    config.train.eval_every = config.train.checkpoint_every = 500
    config.optim.warmup_share = 0.02
    return config
