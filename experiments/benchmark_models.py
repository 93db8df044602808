"""Times whole models against each other: their training steps, or text made token by token.

    python -m experiments.benchmark_models train --vocab=50257 --run=configs/t1_small.py:row=dense \\
        --run=configs/t1_small.py:row=tree_hard_P1_W12
    python -m experiments.benchmark_models train --vocab=50257 --run=configs/t1_small.py:row=dense \\
        --run=configs/sweeps/leaves.py#recipe      # a row of a sweep
    python -m experiments.benchmark_models decode --vocab=50272 --results=results/speed_decode.jsonl \\
        --run=configs/recipe.py:preset=opt_350m,kind=dense --run=configs/recipe.py:preset=opt_350m

No text is read, and weights are random. The configs take turns, ratios are of medians in one run, to the
first config. train compiles each as training does, after the dense start of layers that have one or, by
--start, in it; batches are of random tokens whose frequencies fall as those of words do (Zipf); `counting` is
the share of a step that its visit counts take: the median of (with - without) / with. Of one config alone it
says the memory too: what the compiler said, which is `plan`'s figure, and the most that was in use. decode
makes --new tokens after --context others in each of --batch texts, drawn at random.
"""

import os

import jax
from absl import flags

from experiments.benchmarks.decode_times import Decoding
from experiments.benchmarks.step_times import Steps, load_config
from experiments.benchmarks.timing import take_turns
from experiments.common import cli, path_flags
from experiments.reporting import record
from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.training import sharding
from tree_ffn.training.metrics import costs
from tree_ffn.tree.rows import in_place

_RUNS = flags.DEFINE_multi_string(
    "run", [], "A config, FILE:key=value,..., or a row of a sweep, FILE#ROW; ratios are to the first."
)
_VOCAB = flags.DEFINE_integer("vocab", 257, "Size of the vocabulary, e.g. 50257.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time to spend on every config.")
_START = flags.DEFINE_bool(
    "start", False, "train: steps in the dense start of layers that have one, not after it."
)
_BATCH = flags.DEFINE_integer("batch", 1, "decode: texts that grow together.")
_CONTEXT = flags.DEFINE_integer("context", 64, "decode: tokens of each text before.")
_NEW = flags.DEFINE_integer("new", 32, "decode: tokens of a turn.")
_RESULTS = path_flags.define_written("results", None, "Append rows of speed_steps or speed_decode here.")

SUITES = ("train", "decode")
UNITS = {"time_ms": "ms", "tokens_per_s": "tokens/s", "planned_gb": "GB", "peak_gb": "GB"}


def main(suite: str = "train") -> None:
    check_choice("suite", suite, SUITES)
    if not _RUNS.value:
        raise InputError("--run is missing; name at least one config, e.g. --run=configs/quickstart.py.")
    check_positive_int("--vocab", _VOCAB.value, least=2)
    for flag in (_BATCH, _CONTEXT, _NEW):
        check_positive_int(f"--{flag.name}", flag.value)
    for name in _RUNS.value:
        if _RUNS.value.count(name) > 1:
            raise InputError(f"--run: {name!r} is given twice; give it once.")
    configs = {name: load_config(name) for name in _RUNS.value}
    timed = time_steps(configs) if suite == "train" else time_decoding(configs)
    first = next(iter(timed.values()))
    what = "a step" if suite == "train" else "a token"
    print(f"{'ms ' + what:>11} {'tokens/s':>10} {'speed':>6} {'counting':>9} {'active':>7}")
    for name, one in timed.items():
        figures = one.figures(first)
        if isinstance(one, Steps) and len(timed) == 1:
            figures |= one.say_memory()
        counting = f"{figures['counting']:.2%}" if "counting" in figures else ""
        print(
            f"{figures['time_ms']:11.2f} {figures['tokens_per_s']:10,.0f} {figures['ratio_to_first']:6.2f} "
            f"{counting:>9} {costs(one.model)['active_share']:7.1%}  {name}"
        )
        if _RESULTS.value:
            write(name, one, figures)


def time_steps(configs: dict) -> dict[str, Steps]:
    """Training steps of each config, on all devices."""
    mesh = sharding.make_mesh(-1, 1)
    with jax.set_mesh(mesh):
        timed = {name: Steps(config, _VOCAB.value, mesh, _START.value) for name, config in configs.items()}
        for one in timed.values():
            one.compile()
        take_turns(list(timed.values()), _SECONDS.value)
    return timed


def time_decoding(configs: dict) -> dict[str, Decoding]:
    """Text by each config's model, on one device."""
    sizes = (_VOCAB.value, _BATCH.value, _CONTEXT.value, _NEW.value)
    timed = {name: Decoding(config, *sizes) for name, config in configs.items()}
    for one in timed.values():
        one.compile()
    take_turns(list(timed.values()), _SECONDS.value)
    return timed


def write(name: str, one: Steps | Decoding, figures: dict[str, float]) -> None:
    """One row for every figure; the row is called as the config's argument says.

    Args:
      name: of the config file, with its argument.
      one: what was timed.
      figures: {metric: value}.
    """
    path, _, argument = name.replace("#", ":").partition(":")
    argument = argument.replace("row=", "").replace(":", "_")
    start = "start" if _START.value else ""
    row = "_".join([os.path.splitext(os.path.basename(path))[0], *filter(None, [argument, start])])
    config = record.resolved(one.config)
    config["data"] = {"corpus": "random", "vocab_size": one.model.vocab_size}
    if isinstance(one, Decoding):
        config["decode"] = {
            "batch": _BATCH.value, "context": _CONTEXT.value, "new": _NEW.value,
            "kernels": in_place(one.model.dtype), "cores": len(os.sched_getaffinity(0)),
        }  # fmt: skip
    for metric, value in figures.items():
        record.append_result(
            _RESULTS.value, table="speed_decode" if isinstance(one, Decoding) else "speed_steps",
            row=row.replace("=", "").replace(",", "_"), metric=metric, value=value,
            unit=UNITS.get(metric, "1"), seed=None, config=config,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, prints=lambda: not _RESULTS.value)
