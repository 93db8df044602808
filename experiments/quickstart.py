"""Trains three small models that differ in their feed-forward layers, and compares them in one table.

    python -m experiments.quickstart                        # what `make quickstart` runs
    python -m experiments.quickstart --seeds=0,1,2 --results=results/quickstart.jsonl

A dense layer, a narrow one (dense with as many units as the sparse layer uses for a token), and the
recommended one (configs/recipe.py) see the same text for the same steps, each at its own rate
(configs/quickstart.py). The table says what a token costs, routing counted, and what a step took; the three
loss curves are drawn into losses.svg beside the runs. Interrupted, the same command goes on where it was; to
start anew, remove runs/quickstart.
"""

import importlib
import os
import statistics
import sys
import time

import jax
from absl import flags

from experiments.common import cli, path_flags, provenance
from experiments.reporting import drawing, record
from tree_ffn.analysis.dynamics import read_lines
from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.inference.batching import generate
from tree_ffn.inference.sampling import Sampling
from tree_ffn.locks import only_writer
from tree_ffn.models import active_units, total_units
from tree_ffn.models.cost import products_metrics
from tree_ffn.paths import replacing
from tree_ffn.training.loop import train
from tree_ffn.training.plan import plan_run, prepare_data
from tree_ffn.training.restore import restore_for_inference

_CONFIG = flags.DEFINE_enum("config", "quickstart", ["quickstart", "smoke"], "File in configs/, without .py.")
_STEPS = flags.DEFINE_integer("steps", None, "Training steps, in place of the config's.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, e.g. 0,1,2: each trains all models.")
_WORKDIR = path_flags.define("workdir", "runs/quickstart", "Where the runs go, one directory each.")
_RESULTS = path_flags.define_written("results", None, "Append all metrics to this results file (JSONL).")
_PROMPT = flags.DEFINE_string("prompt", "def read(self, ", "Beginning of the generated text.")

# Kinds of configs/quickstart.py, and what they are called.
KINDS = {"dense": "dense", "narrow": "narrow", "leaf": "recommended"}


def main() -> None:
    drawing.check_installed("quickstart")
    wanted = seeds()
    configs = {kind: configure(kind) for kind in KINDS}
    with only_writer(_WORKDIR.value, "--workdir"):
        compare(wanted, configs)


def compare(wanted: list[int], configs: dict) -> None:
    """Trains all kinds with every seed, and prints what came of it."""
    started = time.perf_counter()
    remember_compiled_programs()
    models = {kind: plan_run(config).model for kind, config in configs.items()}
    data = prepare_data(configs["leaf"], models["leaf"])
    figures = {kind: [] for kind in KINDS}
    for seed in wanted:
        for kind, config in configs.items():
            rate = f"learning rate {config.optim.lr:g}"
            print(f"\n{KINDS[kind]}, seed {seed}: {config.train.steps} steps at {rate}")
            config.seed = seed
            done = train(config, workdir(kind, seed), origin=provenance.origin)
            figures[kind].append(done)
            if _RESULTS.value:
                record_run(kind, config, data.meta, done)

    print("\n" + table(models, data.meta, configs["leaf"], figures))
    print(f"\nThe loss curves are drawn in {draw(wanted[0])}.")
    print("\n" + sample(data.tokenizer, workdir("leaf", wanted[0])))
    print("\n" + next_commands(workdir("leaf", wanted[0])))
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all.")


def remember_compiled_programs() -> None:
    """A second run starts faster."""
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


def record_run(kind: str, config, data_meta: dict, figures: dict) -> None:
    """Appends the figures of one run to --results.

    Args:
      kind: of layers.
      config: of the run.
      data_meta: of the text.
      figures: {metric: value}.
    """
    record.append_figures(
        _RESULTS.value, figures, table="quickstart", row=row_name(kind), config=config, data_meta=data_meta
    )


def row_name(kind: str) -> str:
    """`recipe` of the recommended layer; other kinds have their own names."""
    return "recipe" if kind == "leaf" else kind


def table(models: dict, data_meta: dict, config, figures: dict) -> str:
    """The one table: what was run, a row a kind, and whether the recommended layer ended below narrow.

    Args:
      models: {kind: ModelSpec}.
      data_meta: of the text.
      config: of any of the runs.
      figures: {kind: {metric: a value a seed}}.
    """
    head = ("", "bits per byte", "active units", "products a token", "tokens/s", "ms a step")
    rows = [head]
    for kind, name in KINDS.items():
        ffn, costs = models[kind].ffns[0], products_metrics(models[kind])
        seconds, rate = (mean(figures[kind], of) for of in ("seconds_per_step", "tokens_per_s"))
        rows.append((
            name,
            spread([done["bits_per_byte"] for done in figures[kind]]),
            f"{active_units(ffn)} of {total_units(ffn)}",
            f"{costs['products']:,.0f} ({100 * costs['products_share']:.1f} %)",
            "-" if rate is None else f"{rate:,.0f}",
            "-" if seconds is None else f"{1e3 * seconds:.0f}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]  # fmt: skip
    rule = "-" * len(lines[0])
    model = models["leaf"]
    python = f" of Python {data_meta['python']}" if "python" in data_meta else ""
    title = (
        f"{data_meta['corpus']}{python}, {model.n_layers} layers of width {model.width}, "
        f"{config.train.steps} steps of {config.train.batch_size} x {model.max_seq_len} tokens, "
        f"{record.device_name()}; loss on held-out text"
    )
    note = "products: dot products of the model's width that a token needs in a layer, routing counted"
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, verdict(figures), rule, note])


def verdict(figures: dict) -> str:
    """Says plainly whether the recommended layer ended below the narrow one, and by how much."""
    ours, narrow = ([done["bits_per_byte"] for done in figures[kind]] for kind in ("leaf", "narrow"))
    below = [n - t for t, n in zip(ours, narrow)]
    average = sum(below) / len(below)
    share = 100 * average / (sum(narrow) / len(narrow))
    each = f" (each seed: {', '.join(f'{b:+.4f}' for b in below)})" if len(below) > 1 else ""
    if min(below) > 0:
        return f"recommended ended BELOW narrow by {average:.4f} bits per byte, {share:.1f} %{each}"
    if len(below) > 1 and max(below) > 0:
        return (
            f"recommended ended below narrow in some seeds only: by {average:.4f} bits per byte on "
            f"average{each}"
        )
    return f"recommended did NOT end below narrow: it is {-average:.4f} bits per byte above{each}"


def draw(seed: int) -> str:
    """Draws the training losses of a seed's runs; returns the file."""
    lines = []
    for kind, name in KINDS.items():
        found = [
            line for line in read_lines(workdir(kind, seed), "metrics.jsonl") if line["split"] == "train"
        ]
        lines.append(drawing.Series(name, [line["step"] for line in found], [line["loss"] for line in found]))
    path = os.path.join(_WORKDIR.value, "losses.svg")
    with replacing(path) as file:
        file.write(drawing.alone(drawing.line_chart("Training loss", lines, "step", "nats a token")))
    return path


def mean(figures: list[dict], name: str) -> float | None:
    """Mean of a figure over the runs that have it; a run that was finished before has no speed."""
    values = [done[name] for done in figures if name in done]
    return sum(values) / len(values) if values else None


def spread(values: list[float]) -> str:
    """`2.4312`, or mean and standard deviation of several."""
    text = f"{sum(values) / len(values):.4f}"
    return text if len(values) == 1 else f"{text} +- {statistics.stdev(values):.4f}"


def sample(tokenizer, directory: str, n_samples: int = 2) -> str:
    """Text with which a model goes on after --prompt, as far as its context reaches.

    Args:
      tokenizer: of the run.
      directory: of the run.
      n_samples: how many texts.
    """
    run = restore_for_inference(directory, "latest")
    prompt = tokenizer.encode(_PROMPT.value)[: run.model.max_seq_len // 2].tolist()
    sampling = Sampling(temperature=0.8, top_k=40)
    room = run.model.max_seq_len - len(prompt)
    texts = [prompt + new for new in generate(run.model, run.variables, [prompt] * n_samples, room, sampling)]
    return "\n\n".join(f"Sample {i}: {tokenizer.decode(ids)}" for i, ids in enumerate(texts, 1))


def next_commands(run: str) -> str:
    """Three things to try."""
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"
    config = "--config=configs/quickstart.py"
    return "\n".join((
        "Next:",
        f"  {python} -m experiments.generate --workdir={run} --prompt='class Tree:' --temperature=0.8",
        f"  {python} -m experiments.train {config}:kind=tree --workdir=runs/paths        # the paper's layer",
        f"  {python} -m experiments.report --workdir={run} --to=report.html",
    ))  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
