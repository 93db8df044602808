"""Baselines at rates of their own: dense, narrow and mixtures, tuned at T1-small's full length.

    python -m experiments.ablate --sweep=configs/sweeps/fairness.py --tune --gpus=0,1 \\
        --workdir=runs/fairness --results=results/quality.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py. T1 chose one rate for all kinds among three, by runs of 15 M
tokens. Here every kind tries the same four rates at 60 M tokens, with Adam's b2 of .99 and of .95.
`dense_w_out565` is dense with initial output weights as large as those of a dense start: sqrt(F / A) = 5.65
times the others'. Mixtures begin dense, and one kind of them has rows of two more rates of balancing.

`LOUDER` came later, when the leaf layer gained by first output weights four times as large
(configs/sweeps/leaves.py): all others get weights two and four times as large too, at their own rates, and
dense, whose best of those was the edge, eight times. What is best with seed 0 gets seeds 1 and 2.

Protocol, written before the runs: a kind's rate is that of the lowest validation loss on Wikipedia, seed 0;
a best at the edge of the grid extends it by factors of two; of each layer the better b2 stands for it, and
dense takes the better of its two scales. What is compared afterwards has three seeds at that rate.
"""

from configs import common
from configs.sweeps.leaves import experts

MOE = "moe_top16_X512_norm2_leak100_20"
LAYERS = {
    "dense": {"row": "dense"},
    "dense_w_out565": {"row": "dense", "model.init.w_out": 0.2827},
    "narrow_A96": {"row": "narrow_A96"},
    MOE: {"row": "moe_top4_X128", "ffn.gate_norm": "l2", "ffn.dense_start": 0.2, **experts(512, 16, 6)},
}
LOUDER = {  # a row: what else it is like, its first output weights, its rate
    "dense_w_out1131_b99": ("dense_w_out565_b99", 0.5654, 1.5e-3),
    "dense_w_out2262_b99": ("dense_w_out565_b99", 1.1308, 1.5e-3),
    "dense_w_out4523_b99": ("dense_w_out565_b99", 2.2616, 1.5e-3),
    "narrow_A96_b99_out2": ("narrow_A96_b99", 0.1, 1.5e-3),
    "narrow_A96_b99_out4": ("narrow_A96_b99", 0.2, 1.5e-3),
    f"{MOE}_b95_out2": (f"{MOE}_b95", 0.1, 2.12e-3),
    f"{MOE}_b95_out4": (f"{MOE}_b95", 0.2, 2.12e-3),
}
RATES = [7.5e-4, 1.06e-3, 1.5e-3, 2.12e-3]


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, the first of them, length (of configs/t1_small.py)."""
    arg = common.parse_arg(arg, seeds=3, first=0, length="full")
    rows = {
        f"{name}_b{b2}": {"set": {**layer, "optim.b2": b2 / 100, "length": arg.length}}
        for b2 in (99, 95)
        for name, layer in LAYERS.items()
    }
    for balance in (1e-4, 1e-2):
        values = {**rows[f"{MOE}_b99"]["set"], "ffn.balance_rate": balance}
        rows[f"{MOE}_b99_balance{balance:g}"] = {"set": values, "kind": f"{MOE}_b99"}
    for name, (kind, w_out, rate) in LOUDER.items():
        values = {**rows[kind]["set"], "model.init.w_out": w_out, "optim.lr": rate}
        rows[name] = {"set": values, "kind": kind}
    return {
        "config": "configs/t1_small.py",
        "table": "quality_attempts",
        "seeds": list(range(arg.first, arg.seeds)),
        "rows": rows,
        "tuning": {"key": "optim.lr", "values": RATES, "set": {"train.eval_every": 0}},
    }
