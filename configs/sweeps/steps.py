"""Models whose training steps are timed against each other; no run trains them.

    STEPS=configs/sweeps/steps.py:preset=opt_125m
    python -m experiments.benchmark_models train --vocab=50257 --results=results/speed_steps.jsonl \\
        --run=$STEPS#dense --run=$STEPS#leaf --run=$STEPS#moe
    python -m experiments.benchmark_models train --vocab=50257 --start --run=$STEPS#dense --run=$STEPS#leaf

Layers have 4 E units: T1's dense layer has 3,060, of which GPUs multiply no whole pieces. A step is of 32,768
tokens of configs/t1_small.py, or of 8 sequences of 2,048 of configs/scale.py.
"""

from configs import common

PRESETS = ("t1_small", "opt_125m", "opt_1.3b")


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: preset (one of PRESETS)."""
    arg = common.parse_arg(arg, preset="t1_small")
    common.check_known(arg, preset=PRESETS)
    if arg.preset == "t1_small":
        leaf = {"row": "leaf_X512_K16"}
        rows = {
            "dense": {"row": "dense", "ffn.width": 3072},
            "leaf": leaf,
            "moe": leaf | {"ffn.router": "softmax"},
        }
        return {"config": "configs/t1_small.py", "table": "speed_steps", "rows": _named(rows)}
    size = {"preset": arg.preset, "chips": 1, "train.batch_size": 8, "train.grad_accum_steps": 1}
    rows = {kind: size | {"kind": kind} for kind in ("dense", "leaf", "moe")}
    return {"config": "configs/scale.py", "table": "speed_steps", "rows": _named(rows)}


def _named(rows):
    return {name: {"set": values} for name, values in rows.items()}
