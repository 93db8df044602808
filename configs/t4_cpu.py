"""The paper's dynamics where there is only a CPU: activation x site, balanced or not, 12 minutes in all.

    python -m experiments.ablate --sweep=configs/sweeps/t4_cpu.py --workdir=runs/t4 --results=runs/t4.jsonl
    python -m experiments.tables --results=runs/t4.jsonl

Claims and unknowns are those of configs/t4_small.py. Here: the model, text and length of configs/t1_cpu.py,
hard routing with P=2, W=1.

What it can show: how dead leaves and the leaves' entropy differ between activations and sites early in
training, and that balancing by thresholds works. What it cannot: paths go dead over far more tokens
than 0.6 M, and leaves that no token has reached yet look the same; its losses rank nothing.
"""

from configs import common, t1_cpu
from configs.t4_small import BALANCES

ROUTINGS = {
    "hard": "tree_hard_P2_W1",
    "narrow": "narrow_A16",
    "dense": "dense",
}


def get_config(arg=None):
    """Arguments: activation, site (node, sum), routing (one of ROUTINGS), balance (none, sign), seed."""
    arg = common.parse_arg(arg, activation="gelu", site="node", routing="hard", balance="none", seed=0)
    common.check_known(arg, routing=ROUTINGS, balance=BALANCES)
    config = t1_cpu.get_config(f"row={ROUTINGS[arg.routing]},seed={arg.seed}")
    config.ffn.activation, config.ffn.act_site = arg.activation, arg.site
    config.ffn.balance_rate = BALANCES[arg.balance]
    config.train.eval_every = 100
    return config
