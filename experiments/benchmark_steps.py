"""Times whole training steps of several configs against each other, and what counting visits costs.

    python -m experiments.benchmark_steps --vocab=50257 --run=configs/t1_small.py:row=dense \\
        --run=configs/t1_small.py:row=tree_hard_P1_W12
    python -m experiments.benchmark_steps --run=configs/quickstart.py --results=results/speed_steps.jsonl
    python -m experiments.benchmark_steps --vocab=50257 --run=configs/t1_small.py:row=dense \\
        --run=configs/sweeps/leaves.py#leaf_X512_K16_beam      # a row of a sweep

Every config is compiled as training compiles it. Batches are of random tokens whose frequencies fall as those
of words do (Zipf): no text is read. The configs take turns, ratios are of medians in one run, to the first
config. `counting` is the share of a step that its visit counts take: the median of (with - without) / with.
"""

import os

import jax
from absl import flags

from experiments.benchmarks.step_times import Steps, load_config, measure
from experiments.common import cli, path_flags
from experiments.reporting import record
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.training import sharding
from tree_ffn.training.metrics import costs

_RUNS = flags.DEFINE_multi_string(
    "run", [], "A config, FILE:key=value,..., or a row of a sweep, FILE#ROW; ratios are to the first."
)
_VOCAB = flags.DEFINE_integer("vocab", 257, "Size of the vocabulary, e.g. 50257.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time to spend on every config.")
_RESULTS = path_flags.define_written("results", None, "Append rows of table speed_steps to this file.")


def main() -> None:
    if not _RUNS.value:
        raise InputError("--run is missing; name at least one config, e.g. --run=configs/quickstart.py.")
    check_positive_int("--vocab", _VOCAB.value, least=2)
    mesh = sharding.make_mesh(-1, 1)
    with jax.set_mesh(mesh):
        timed = {}
        for name in _RUNS.value:
            if name in timed:
                raise InputError(f"--run: {name!r} is given twice; give it once.")
            timed[name] = Steps(load_config(name), _VOCAB.value, mesh)
        for steps in timed.values():
            steps.compile()
        measure(list(timed.values()), _SECONDS.value)
    first = next(iter(timed.values()))
    print(f"{'ms a step':>10} {'tokens/s':>10} {'speed':>6} {'counting':>9} {'active':>7}")
    for name, steps in timed.items():
        figures = steps.figures(first)
        print(
            f"{figures['time_ms']:10.2f} {figures['tokens_per_s']:10,.0f} {figures['ratio_to_first']:6.2f} "
            f"{figures.get('counting', 0.0):9.2%} {costs(steps.model)['active_share']:7.1%}  {name}"
        )
        if _RESULTS.value:
            write(name, steps, figures)


def write(name: str, steps: Steps, figures: dict[str, float]) -> None:
    """One row of table `speed_steps` for every figure; the row is called as the config's argument says."""
    path, _, argument = name.replace("#", ":").partition(":")
    argument = argument.replace("row=", "").replace(":", "_")
    row = "_".join([os.path.splitext(os.path.basename(path))[0], *filter(None, [argument])])
    config = record.resolved(steps.config)
    config["data"] = {"corpus": "random", "vocab_size": steps.model.vocab_size}
    for metric, value in figures.items():
        record.append_result(
            _RESULTS.value, table="speed_steps", row=row.replace("=", "").replace(",", "_"), metric=metric,
            value=value, unit={"time_ms": "ms", "tokens_per_s": "tokens/s"}.get(metric, "1"), seed=None,
            config=config,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
