r"""Fine-tuning of a model that is there: what experiments/convert wrote, a run of training, or an export.

    python -m experiments.finetune --config=configs/finetune.py:start=runs/tree --workdir=runs/tuned
    python -m experiments.finetune --config=configs/finetune.py:start=runs/tree,teacher=runs/dense,kl=1 \
        --workdir=runs/distilled

The model is that of `finetune.start`; of `model` and `ffn` here, only `model.remat` and
`ffn.implementation` count. Text, tokenizer and cache are those of the start where `data` names no others.
"""

from configs import common


def get_config(arg=None):
    """Arguments: start, teacher, kl, ffn (see below), steps, seed."""
    arg = common.parse_arg(arg, start="", teacher="", kl=0.0, ffn=0.0, steps=1000, seed=0)
    config = common.base_config()
    config.seed = arg.seed

    config.finetune = common.finetune_section()
    config.finetune.start, config.finetune.teacher = arg.start, arg.teacher
    config.finetune.kl, config.finetune.ffn = arg.kl, arg.ffn

    config.data.corpus = "start"  # the text of finetune.start, where data names no other
    config.data.tokenizer = config.data.cache_dir = ""  # those of finetune.start

    config.train.steps = arg.steps
    config.train.batch_size = 16
    config.train.log_every = max(1, arg.steps // 20)
    config.train.eval_every = max(1, arg.steps // 4)
    config.train.checkpoint_every = 0  # at the end only
    config.train.eval_batches = 20
    config.train.probe = False  # a training step more at every validation

    config.optim.lr = 1e-3
    config.optim.warmup_share = 0.05
    config.optim.final_share = 0.05
    return config
