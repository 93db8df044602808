"""Trains a small model of trees and the narrow dense one, and compares them in one table.

    python -m experiments.quickstart                        # what `make quickstart` runs
    python -m experiments.quickstart --seeds=0,1,2 --results=results/quickstart.jsonl

Both kinds of configs/quickstart.py see the same text for the same steps, each at the best
learning rate tried for it. Interrupted, the same command goes on where it was; to start anew, remove
runs/quickstart.
"""

import importlib
import os
import statistics
import sys
import time

import jax
from absl import flags

from experiments import cli, path_flags, provenance, record
from tree_ffn.data.pipeline import Batches
from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.locks import only_writer
from tree_ffn.models import active_units, total_units
from tree_ffn.models.batch import generate
from tree_ffn.models.sampling import Sampling
from tree_ffn.training import setup
from tree_ffn.training.checkpoint import restore_for_inference
from tree_ffn.training.loop import train
from tree_ffn.training.programs import compile_programs
from tree_ffn.training.sharding import put_batch

_CONFIG = flags.DEFINE_enum("config", "quickstart", ["quickstart", "smoke"], "File in configs/, without .py.")
_STEPS = flags.DEFINE_integer("steps", None, "Training steps, in place of the config's.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, e.g. 0,1,2: each trains both models.")
_WORKDIR = path_flags.define("workdir", "runs/quickstart", "Where the runs go, one directory each.")
_RESULTS = path_flags.define_written("results", None, "Append all figures to this results file (JSONL).")
_PROMPT = flags.DEFINE_string("prompt", "def read(self, ", "Beginning of the generated text.")

KINDS = ("tree", "narrow")
TIMED = ("grouped", "masked")


def main() -> None:
    wanted = seeds()
    configs = {kind: configure(kind) for kind in KINDS}
    with only_writer(_WORKDIR.value, "--workdir"):
        compare(wanted, configs)


def compare(wanted: list[int], configs: dict) -> None:
    """Trains both kinds with every seed, and prints what came of it."""
    started = time.perf_counter()
    remember_compiled_programs()
    plan = setup.plan_run(configs["tree"])
    data = setup.prepare_data(configs["tree"], plan.model)

    print("timing a training step of the two executions of the tree layer ...", flush=True)
    timed = {name: executed_by(configs["tree"], name) for name in TIMED}
    step_ms = {name: time_step(config, data) for name, config in timed.items()}
    trains = [name for name in TIMED if trains_as(timed[name], configs["tree"])]
    configs["tree"].ffn.implementation = min(trains, key=lambda name: step_ms[name])

    figures = {kind: [] for kind in KINDS}
    for seed in wanted:
        for kind, config in configs.items():
            print(f"\n{kind}, seed {seed}: {config.train.steps} steps at learning rate {config.optim.lr:g}")
            config.seed = seed
            done = train(config, workdir(kind, seed), origin=provenance.origin)
            figures[kind].append(done)
            if _RESULTS.value:
                record_run(kind, config, data.meta, done)
    if _RESULTS.value:
        record_times(timed, data.meta, step_ms)

    print("\n" + table(plan.model, data.meta, configs, figures, timed, step_ms))
    print("\n" + sample(data.tokenizer, workdir("tree", wanted[0])))
    print("\n" + next_commands(workdir("tree", wanted[0])))
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all.")


def remember_compiled_programs() -> None:
    """The step that was timed is the step that trains, and a second run starts faster."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(".jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def configure(kind: str):
    """The config of a kind, shortened if --steps says so."""
    steps = _STEPS.value
    if steps is not None and steps < 1:
        raise InputError(f"--steps: {steps} is not allowed; use at least 1.")
    get_config = importlib.import_module(f"configs.{_CONFIG.value}").get_config
    return get_config(f"kind={kind}" if steps is None else f"kind={kind},steps={steps}")


def seeds() -> list[int]:
    """--seeds as numbers."""
    if not _SEEDS.value or not all(is_whole_number(word) for word in _SEEDS.value):
        raise InputError(f"--seeds: {','.join(_SEEDS.value)!r} is not allowed; use numbers such as 0,1,2.")
    return [int(word) for word in _SEEDS.value]


def workdir(kind: str, seed: int) -> str:
    """Directory of one run; a shortened run does not meet a whole one."""
    steps = "" if _STEPS.value is None else f"_steps{_STEPS.value}"
    return os.path.join(_WORKDIR.value, f"{kind}_seed{seed}{steps}")


def executed_by(config, implementation: str):
    """The config under one execution; grouped trains no leak and no straight-through, and times the rest."""
    config = config.copy_and_resolve_references()
    config.ffn.implementation = implementation
    if implementation == "grouped":
        config.ffn.leak = 0.0
        if config.ffn.routing == "straight_through":
            config.ffn.routing = "hard"
    return config


def trains_as(timed, config) -> bool:
    """Whether the config that was timed is the one that is asked for."""
    return (timed.ffn.routing, timed.ffn.leak) == (config.ffn.routing, config.ffn.leak)


def time_step(config, data, n_steps: int = 12) -> float:
    """Median milliseconds of a training step, after the ones that compile."""
    plan = setup.plan_run(config)
    programs = compile_programs(plan)
    batches = Batches(data.train, plan.train.batch_size, plan.seed)
    times = []
    with jax.set_mesh(plan.mesh):
        state, usage = programs.init(jax.random.key(plan.seed)), programs.scorer.empty_usage()
        for step in range(n_steps + 2):
            batch = put_batch(batches.at(step), plan.mesh)
            start = time.perf_counter()
            state, usage, metrics = programs.train_step(state, usage, batch)
            jax.block_until_ready(metrics)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def record_run(kind: str, config, data_meta: dict, figures: dict) -> None:
    """Appends the figures of one run to --results."""
    name = row_name(kind, config)
    record.append_figures(
        _RESULTS.value, figures, table="quickstart", row=name, config=config, data_meta=data_meta
    )


def record_times(timed: dict, data_meta: dict, step_ms: dict) -> None:
    """Appends the time per training step of each execution."""
    for name, config in timed.items():
        known = record.public_config(config, data_meta)
        row = f"{row_name('tree', config)}_{name}_train"
        record.append_result(
            _RESULTS.value, table="quickstart", row=row, metric="time_ms", value=step_ms[name], seed=None,
            config=known,
        )  # fmt: skip


def row_name(kind: str, config) -> str:
    """`tree_continuous_P16_D5_experts_norm2_beam2_leak100_20`, `tree_straight_P2_W1` or `narrow_A16`."""
    ffn = config.ffn
    if kind == "narrow":
        return f"narrow_A{active_units(setup.plan_run(config).model.ffns[0])}"
    leak = f"_leak{100 * ffn.leak:.0f}_{100 * ffn.leak_share:.0f}" if ffn.leak else ""
    name = f"tree_{ffn.routing.split('_')[0]}_P{ffn.n_trees}"
    if ffn.router == "silent":
        norm = f"_norm{ffn.gate_norm}" if ffn.renormalise else ""
        beam = f"_beam{ffn.beam}" if ffn.beam > 1 else ""
        return f"{name}_D{ffn.depth}_experts{norm}{beam}{leak}"
    width = ffn.node_width if isinstance(ffn.node_width, int) else "x".join(map(str, ffn.node_width))
    return f"{name}_W{width}{leak}"


def table(model, data_meta: dict, configs: dict, figures: dict, timed: dict, step_ms: dict) -> str:
    """The one table: what was run, a row a kind, and which of them ended lower."""
    config = configs["tree"]
    total, active = total_units(model.ffns[0]), active_units(model.ffns[0])
    share = {"tree": f"{active} of {total} ({100 * active / total:.1f} %)", "narrow": f"{active} of {active}"}
    note = {name: "" if trains_as(c, config) else " (hard)" if c.ffn.routing == "hard" else " (no leak)"
            for name, c in timed.items()}  # fmt: skip
    steps = {"tree": ", ".join(f"{ms:.0f} {name}{note[name]}" for name, ms in step_ms.items())}
    head = ("", "bits per byte", "active units", "tokens/s", "ms a step")
    rows = [head]
    for kind in KINDS:
        seconds = mean(figures[kind], "seconds_per_step")
        ms = steps.get(kind) or ("-" if seconds is None else f"{1e3 * seconds:.0f}")
        rate = mean(figures[kind], "tokens_per_s")
        rate = "-" if rate is None else f"{rate:,.0f}"
        bits = spread([done["bits_per_byte"] for done in figures[kind]])
        rows.append((row_name(kind, configs[kind]), bits, share[kind], rate, ms))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]  # fmt: skip
    rule = "-" * len(lines[0])
    python = f" of Python {data_meta['python']}" if "python" in data_meta else ""
    title = (
        f"{data_meta['corpus']}{python}, {model.n_layers} layers of width {model.width}, "
        f"{config.train.steps} steps of {config.train.batch_size} x {model.context} tokens, "
        f"{record.device_name()}; loss on held-out text"
    )
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, verdict(figures), rule])


def verdict(figures: dict) -> str:
    """Says plainly whether the trees ended below the narrow layer, and by how much."""
    tree, narrow = ([done["bits_per_byte"] for done in figures[kind]] for kind in KINDS)
    below = [n - t for t, n in zip(tree, narrow)]
    average = sum(below) / len(below)
    share = 100 * average / (sum(narrow) / len(narrow))
    each = f" (each seed: {', '.join(f'{b:+.4f}' for b in below)})" if len(below) > 1 else ""
    if min(below) > 0:
        return f"tree ended BELOW narrow by {average:.4f} bits per byte, {share:.1f} %{each}"
    if len(below) > 1 and max(below) > 0:
        return f"tree ended below narrow in some seeds only: by {average:.4f} bits per byte on average{each}"
    return f"tree did NOT end below narrow: it is {-average:.4f} bits per byte above{each}"


def mean(figures: list[dict], name: str) -> float | None:
    """Mean of a figure over the runs that have it; a run that was finished before has no speed."""
    values = [done[name] for done in figures if name in done]
    return sum(values) / len(values) if values else None


def spread(values: list[float]) -> str:
    """`2.4312`, or mean and standard deviation of several."""
    text = f"{sum(values) / len(values):.4f}"
    return text if len(values) == 1 else f"{text} +- {statistics.stdev(values):.4f}"


def sample(tokenizer, directory: str, n_samples: int = 2) -> str:
    """Text with which the tree model goes on after --prompt, as far as its context reaches."""
    run = restore_for_inference(directory, "latest")
    prompt = tokenizer.encode(_PROMPT.value)[: run.model.context // 2].tolist()
    sampling = Sampling(temperature=0.8, top_k=40)
    room = run.model.context - len(prompt)
    texts = [prompt + new for new in generate(run.model, run.variables, [prompt] * n_samples, room, sampling)]
    return "\n\n".join(f"Sample {i}: {tokenizer.decode(ids)}" for i, ids in enumerate(texts, 1))


def next_commands(tree: str) -> str:
    """Three things to try."""
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"
    config = "--config=configs/quickstart.py"
    return "\n".join((
        "Next:",
        f"  {python} -m experiments.generate --workdir={tree} --prompt='class Tree:' --temperature=0.8",
        f"  {python} -m experiments.train {config}:kind=dense --workdir=runs/dense",
        f"  {python} -m experiments.train {config}:layer=paths --workdir=runs/paths",
    ))  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
