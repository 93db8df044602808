"""Seconds on a CPU: two tiny layers, a few steps; what tests run.

python -m experiments.train --config=configs/smoke.py --workdir=runs/smoke
"""

from configs import common


def get_config(arg=None):
    """Arguments: kind (of the feed-forward layers), steps, seed."""
    arg = common.parse_arg(arg, kind="leaf", steps=6, seed=0)
    config = common.base_config()
    config.seed = arg.seed
    config.model.n_layers, config.model.width, config.model.n_heads, config.model.max_seq_len = 2, 32, 2, 32
    config.ffn.kind = arg.kind
    config.ffn.n_trees, config.ffn.depth, config.ffn.node_width = 2, 3, (1,)
    config.ffn.n_experts, config.ffn.expert_width, config.ffn.top_k = 8, 2, 3
    config.train.batch_size, config.train.steps = 8, arg.steps
    config.train.log_every, config.train.eval_every, config.train.checkpoint_every = 2, 3, 3
    config.train.eval_batches = 2
    config.optim.warmup_steps = min(2, arg.steps)
    return config
