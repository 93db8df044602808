"""What the quickstart's rates were chosen by: rates and scales of the output weights, alike for both kinds.

    python -m experiments.ablate --sweep=configs/sweeps/quickstart.py --workdir=runs/tuning \\
        --results=results/tuning/quickstart_experts.jsonl

18 runs a kind, of seeds that the quickstart does not report; results/tuning/README.md has what was found.
`--sweep=...:layer=paths` takes the other layer of configs/recipe.py.
"""

from configs import common
from configs.quickstart import LAYERS


def get_sweep(arg=None):
    """The sweep as plain data. Argument: layer (of configs/quickstart.py)."""
    arg = common.parse_arg(arg, layer="experts")
    common.check_known(arg, layer=LAYERS)
    return {
        "config": "configs/quickstart.py",
        "table": "quickstart",
        "grids": [
            {
                "name": kind + "_lr{lr}_out{w_out}",
                "over": {"optim.lr": [3e-3, 6e-3, 1.2e-2], "model.init.w_out": [0.05, 0.15]},
                "set": {"kind": kind, "layer": arg.layer},
                "seeds": [10, 11, 12],
            }
            for kind in ("narrow", "tree")
        ],
    }
