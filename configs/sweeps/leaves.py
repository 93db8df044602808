"""The leaf layer at T1-small's size: one tree over small experts, of which a token takes the K likeliest.

    python -m experiments.ablate --sweep=configs/sweeps/leaves.py --workdir=runs/leaves --gpus=0,1 \\
        --results=results/quality.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py. All rows have A = 96 units, of F = 3,072, or of twice (`x2`) or
four times (`x4`) as many. With seed 0 they screen balancing, other routers over the same experts, finer and
coarser ones, more store, other lengths of the dense start, louder outputs (`out2`, `out4`), rates and b2.
"""

from configs import common


def experts(n_experts, top_k, width):
    """Experts of these sizes."""
    return {"ffn.n_experts": n_experts, "ffn.top_k": top_k, "ffn.expert_width": width}


LEAVES = {"row": "leaf_X512_K16", "ffn.gate_norm": "l2", "optim.lr": 2.12e-3}
SLOW = {"optim.lr": 1.5e-3, "optim.b2": 0.99}
SOFTMAX, RMS = {"ffn.router": "softmax"}, {"ffn.gate_norm": "rms"}
X512, X1024, X2048 = ({**LEAVES, **experts(x, 16, 6)} for x in (512, 1024, 2048))


FAST = {**RMS, "optim.lr": 2.12e-3, "optim.b2": 0.99}
KEYS = {"ffn.router": "product_keys"}


def balanced(rate):
    """Decisions moved against the load, by so much a step."""
    return {"ffn.balance_rate": rate}


ROWS = {
    "leaf_X512_K16_beam": {**X512},
    "leaf_X512_K16_beam_b99": {**X512, **SLOW},
    "leaf_X512_K16_beam_balance1e-2": {**X512, **balanced(1e-2)},
    "leaf_X512_K16_beam_balance1e-2_b99": {**X512, **balanced(1e-2), **SLOW},
    "leaf_X512_K16_beam_balance1e-3": {**X512, **balanced(1e-3)},
    "leaf_X512_K16_softmax_balance1e-3": {**X512, **balanced(1e-3), **SOFTMAX},
    "leaf_X512_K16_beam_start40": {**X512, "ffn.dense_start": 0.4},
    "leaf_X512_K16_rms_beam_b99": {**X512, **RMS, **SLOW},
    "leaf_X512_K16_rms_beam_b99_lr212": {**X512, **FAST},
    "leaf_X512_K16_rms_beam_b99_lr300": {**X512, **FAST, "optim.lr": 3e-3},
    "leaf_X512_K16_rms_beam_b99_out2": {**X512, **FAST, "model.init.w_out": 0.1},
    "leaf_X512_K16_rms_beam_b99_out4": {**X512, **FAST, "model.init.w_out": 0.2},
    "leaf_X512_K16_rms_beam_b999_lr212": {**X512, **FAST, "optim.b2": 0.999},
    "leaf_X512_K16_rms_beam_b99_lr212_start30": {**X512, **FAST, "ffn.dense_start": 0.3},
    "leaf_X512_K16_rms_beam_b99_lr106": {**X512, **RMS, **SLOW, "optim.lr": 1.06e-3},
    "leaf_X512_K16_rms_beam_b99_start10": {**X512, **RMS, **SLOW, "ffn.dense_start": 0.1},
    "leaf_X512_K16_rms_softmax_b99": {**X512, **balanced(1e-2), **RMS, **SOFTMAX, **SLOW},
    "leaf_X512_K16_rms_softmax_b99_lr212": {**X512, **balanced(1e-3), **FAST, **SOFTMAX},
    "leaf_X512_K16_rms_keys_b99_lr212": {**X512, **FAST, **KEYS},
    "leaf_X512_K16_rms_keys_balance1e-3_b99_lr212": {**X512, **balanced(1e-3), **FAST, **KEYS},
    "leaf_X1024_K32_rms_keys_b99_lr212": {**LEAVES, **experts(1024, 32, 3), **FAST, **KEYS},
    "leaf_X3072_K96_rms_keys_b99_lr212": {**LEAVES, **experts(3072, 96, 1), **FAST, **KEYS},
    "leaf_X512_K16_rms_random_b99_lr212": {**X512, **FAST, "ffn.router": "random"},
    "leaf_X512_K16_rms_beam_b99_lr212_start10": {**X512, **FAST, "ffn.dense_start": 0.1},
    "leaf_X256_K8_rms_beam_b99_lr212": {**LEAVES, **experts(256, 8, 12), **FAST},
    "leaf_X1024_K32_rms_beam_b99_lr212": {**LEAVES, **experts(1024, 32, 3), **FAST},
    "leaf_x2_X1024_K16_rms_beam_b99_lr212": {**X1024, **FAST},
    "leaf_x2_X2048_K32_rms_keys_b99_lr212": {**LEAVES, **experts(2048, 32, 3), **FAST, **KEYS},
    "leaf_x2_X1024_K16_rms_beam_b99": {**X1024, **RMS, **SLOW},
    "leaf_x2_X1024_K16_beam_balance1e-2": {**X1024, **balanced(1e-2)},
    "leaf_x4_X2048_K16_beam_balance1e-2": {**X2048, **balanced(1e-2)},
}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, the first of them, length (of configs/t1_small.py)."""
    arg = common.parse_arg(arg, seeds=1, first=0, length="full")
    return {
        "config": "configs/t1_small.py",
        "table": "quality_attempts",
        "seeds": list(range(arg.first, arg.seeds)),
        "rows": {name: {"set": {"length": arg.length, **row}} for name, row in ROWS.items()},
    }
