"""What the quickstart's rates were chosen by: rates and scales of the output weights, alike for both kinds.

    python -m experiments.ablate --sweep=configs/sweeps/quickstart.py --workdir=runs/tuning \\
        --results=results/tuning/quickstart.jsonl

18 runs a kind, of seeds that the quickstart does not report; results/tuning/README.md has what was found.
"""


def get_sweep():
    """The sweep as plain data."""
    return {
        "config": "configs/quickstart.py",
        "table": "quickstart",
        "grids": [
            {
                "name": kind + "_lr{lr}_out{w_out}",
                "over": {"optim.lr": [3e-3, 6e-3, 1.2e-2], "model.init.w_out": [0.05, 0.15]},
                "set": {"kind": kind},
                "seeds": [10, 11, 12],
            }
            for kind in ("dense", "narrow", "leaf")
        ],
    }
