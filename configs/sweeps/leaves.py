"""The leaf layer at T1-small's size: one tree over small experts, of which a token takes the K likeliest.

    python -m experiments.ablate --sweep=configs/sweeps/leaves.py --workdir=runs/leaves --gpus=0,1 \\
        --results=results/quality.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py, b2 as in configs/sweeps/fairness.py. All rows have A = 96
units of F = 3,072, or of 6,144 (`x2`). They screen, with seed 0: exact search against a beam, the rate, how
decisions are balanced, and the same experts behind a flat softmax.
"""

from configs import common
from configs.sweeps.quality import DENSE_START, NORM2, experts

LEAVES = {"row": "moe_top4_X128", "ffn.kind": "leaf", **NORM2, **DENSE_START, "optim.b2": 0.99}
FREE = {"ffn.moe_balance": "none"}
BEAM, SOFTMAX = {"ffn.search": "beam"}, {"ffn.leaf_router": "softmax"}
MANY = {**LEAVES, **experts(512, 16, 6)}


def balanced(rate):
    """Decisions moved against the load, by so much a step."""
    return {"ffn.moe_balance": "bias", "ffn.balance_rate": rate}


def lr(rate):
    """Another learning rate than T1's 1.5e-3."""
    return {"optim.lr": rate}


ROWS = {
    "leaf_X512_K16": {**MANY, **FREE},
    "leaf_X512_K16_beam": {**MANY, **FREE, **BEAM},
    "leaf_X512_K16_balance1e-2": {**MANY, **balanced(1e-2)},
    "leaf_X512_K16_balance1e-3": {**MANY, **balanced(1e-3)},
    "leaf_X512_K16_beam_balance1e-3": {**MANY, **balanced(1e-3), **BEAM},
    "leaf_X512_K16_beam_balance1e-2": {**MANY, **balanced(1e-2), **BEAM},
    "leaf_X512_K16_softmax_balance1e-2": {**MANY, **balanced(1e-2), **SOFTMAX},
    "leaf_X512_K16_softmax_balance1e-3": {**MANY, **balanced(1e-3), **SOFTMAX},
    "leaf_x2_X1024_K16_beam_balance1e-2": {**LEAVES, **experts(1024, 16, 6), **balanced(1e-2), **BEAM},
    "leaf_x2_X1024_K16_beam": {**LEAVES, **experts(1024, 16, 6), **FREE, **BEAM},
    "leaf_X512_K16_beam_lr1": {**MANY, **FREE, **BEAM, **lr(1.06e-3)},
    "leaf_X512_K16_beam_lr2": {**MANY, **FREE, **BEAM, **lr(2.12e-3)},
    "leaf_X256_K8_beam": {**LEAVES, **experts(256, 8, 12), **FREE, **BEAM},
    "leaf_X1024_K32_beam": {**LEAVES, **experts(1024, 32, 3), **FREE, **BEAM},
}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, length (of configs/t1_small.py)."""
    arg = common.parse_arg(arg, seeds=1, length="full")
    return {
        "config": "configs/t1_small.py",
        "table": "quality_attempts",
        "seeds": list(range(arg.seeds)),
        "rows": {name: {"set": {"length": arg.length, **row}} for name, row in ROWS.items()},
    }
