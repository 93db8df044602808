"""Twice the training: the recommended layer and its baselines over 120 M tokens, at T1-small's size.

    python -m experiments.ablate --sweep=configs/sweeps/longer.py --workdir=runs/longer --gpus=0,1 \\
        --results=results/quality_longer.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py; its 44 M tokens are passed over 2.7 times.

Protocol, written before the runs: every layer keeps the rate and the b2 that were chosen for it at 60 M
tokens (docs/quality.md). The share of the gap is compared with that of 60 M tokens: seed 0 against seed 0.
Rows of `decay.py` keep their weight decay of 1, or have half of it: if weights should forget in the same
share of a training, half is best for one of twice the length.
"""

from configs.sweeps import decay, fairness, leaves

DENSE = {**fairness.LAYERS["dense_w_out565"], "optim.lr": 1.5e-3, "optim.b2": 0.99}
MOE = {**fairness.LAYERS[fairness.MOE], "optim.lr": 2.12e-3, "optim.b2": 0.95}
ROWS = {
    "dense_w_out565_b99": DENSE,
    "dense_w_out2262_b99": {**DENSE, "model.init.w_out": 1.1308},
    "narrow_A96_b99": {**fairness.LAYERS["narrow_A96"], "optim.lr": 1.5e-3, "optim.b2": 0.99},
    f"{fairness.MOE}_b95_out2": {**MOE, "model.init.w_out": 0.1},
    "leaf_X512_K16_rms_beam_b99_lr212": leaves.QUIET,
    "recipe": leaves.RECIPE,
} | {
    f"{kind}_wd{100 * amount:.0f}": {**layer, "optim.weight_decay": amount}
    for kind, layer in decay.BEST.items()
    for amount in (0.5, 1.0)
}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, the first of them, length (of configs/t1_small.py)."""
    return leaves.sweep_of(ROWS, "quality_longer", arg, length="double")
