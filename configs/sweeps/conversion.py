"""Fine-tuning of conversions with their dense teacher and without it, after `make convert-demo` made them.

    python -m experiments.ablate --sweep=configs/sweeps/conversion.py:steps=300 --tune \\
        --workdir=runs/convert_demo/tuned --results=runs/convert_demo/conversion.jsonl

RUNS/seedN (runs/convert_demo by default) holds the dense run `dense`, and beside it its conversions by the
names of `METHODS`. Each is trained further in two ways:

    tuned       by cross-entropy alone
    distilled   and towards the dense model: finetune.kl = finetune.ffn = weight

The first method is also `faded` (as distilled, the dense layers fading out over the first half), and
distilled at `WEIGHTS` times the weight. The dense model is itself trained further as long.

Learning rates are chosen by the validation loss of the first method's model at seed 0, by one rule for both
ways. All methods take them; `faded` and other weights take that of `distilled`, dense that of `tuned`. Text
is the dense run's; batches are those of configs/finetune.py unless --set=train.batch_size=64 says others.
"""

from typing import Any

from configs import common

METHODS = ("cluster_leaf", "cluster", "cluster_spent", "random_leaf")
WEIGHTS = (0.3, 3.0)


def get_sweep(arg: Any = None):
    """The sweep as plain data. Arguments: runs, steps, weight, seeds, the first of them."""
    arg = common.parse_arg(arg, runs="runs/convert_demo", steps=300, weight=1.0, seeds=1, first=0)
    place = f"{arg.runs}/seed{{seed}}"

    def row(name, weight=0.0, **more):
        values = {"finetune.start": f"{place}/{name}", "finetune.kl": weight, "finetune.ffn": weight}
        return {"kind": "distilled" if weight else "tuned", "set": {**values, **more}}

    best, fading = METHODS[0], {"finetune.gradual": "mix", "finetune.gradual_steps": max(1, arg.steps // 2)}
    rows = {}
    for name in METHODS:
        rows |= {f"{name}_tuned": row(name), f"{name}_distilled": row(name, arg.weight)}
    rows[f"{best}_faded"] = row(best, arg.weight, **fading)
    rows |= {f"{best}_distilled_x{times:g}": row(best, arg.weight * times) for times in WEIGHTS}
    rows["dense_tuned"] = row("dense")
    return {
        "config": "configs/finetune.py",
        "table": "conversion",
        "set": {
            "finetune.teacher": f"{place}/dense",
            "steps": arg.steps,
            "train.eval_every": max(1, arg.steps // 10),
        },
        "seeds": list(range(arg.first, arg.seeds)),
        "rows": rows,
        "tuning": {"key": "optim.lr", "values": [1e-3, 2e-3, 4e-3]},
    }
