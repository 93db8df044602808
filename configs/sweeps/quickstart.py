"""What the quickstart's rates were chosen by: rates and scales of the output weights, alike for all kinds.

    python -m experiments.ablate --sweep=configs/sweeps/quickstart.py --workdir=runs/tuning \\
        --results=results/tuning/quickstart.jsonl

6 runs a kind and seed, of seeds that the quickstart does not report; results/tuning/README.md has what was
found for narrow and for an older recipe.
"""

from configs import common


def get_sweep(arg=None):
    """The sweep as plain data. Argument: seeds."""
    arg = common.parse_arg(arg, seeds=3)
    return {
        "config": "configs/quickstart.py",
        "table": "quickstart",
        "grids": [
            {
                "name": kind + "_lr{lr}_out{w_out}",
                "over": {"optim.lr": [3e-3, 6e-3, 1.2e-2], "model.init.w_out": [0.05, 0.15]},
                "set": {"kind": kind},
                "seeds": list(range(10, 10 + arg.seeds)),
            }
            for kind in ("dense", "narrow", "leaf")
        ],
    }
