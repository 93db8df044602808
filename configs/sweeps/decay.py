"""Weight decay: every kind of layer at T1-small's size with three, ten and twenty times the decay of 0.1.

    python -m experiments.ablate --sweep=configs/sweeps/decay.py --workdir=runs/decay --gpus=0,1 \\
        --results=results/quality.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py, whose 44 M tokens are passed over 1.36 times. Every kind keeps
the rate, the b2 and the first output weights that were best with 0.1 (configs/sweeps/fairness.py, leaves.py).

Protocol: trials of the recommended layer (0.3, 1, 2) and of dense (0.3, 1) with seed 0 came first. Written
before all other rows: narrow and the mixture try 0.3, 1 and 2 as well, dense 2; a kind's decay is that of its
lowest validation loss with seed 0, and gets seeds 1 and 2. Then kinds are compared, pair by pair.
"""

from configs.sweeps import fairness, leaves

LONG_MEMORY = {"optim.b2": 0.99, "optim.lr": 1.5e-3}
BEST = {
    "dense": {**fairness.LAYERS["dense"], **LONG_MEMORY, "model.init.w_out": 1.1308},
    "narrow_A96": {**fairness.LAYERS["narrow_A96"], **LONG_MEMORY, "model.init.w_out": 0.1},
    "moe_top16_X512": {**fairness.LAYERS[fairness.MOE], "optim.lr": 2.12e-3, "model.init.w_out": 0.1},
    "recipe": leaves.RECIPE,
}
DECAYS = (0.3, 1.0, 2.0)
ROWS = {
    f"{kind}_wd{100 * decay:.0f}": {**layer, "optim.weight_decay": decay}
    for kind, layer in BEST.items()
    for decay in DECAYS
}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, the first of them, length (of configs/t1_small.py)."""
    return leaves.sweep_of(ROWS, "quality_attempts", arg)
