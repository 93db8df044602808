"""From a dense model to a sparse one and back to its loss: converts, fine-tunes with or without a teacher.

    python -m experiments.convert_demo --workdir=runs/demo --results=runs/conversion.jsonl
    python -m experiments.convert_demo --dense=runs/dense --seeds=0,1,2 --task_data=DATA \
        --texts=wikitext2=wikitext2/test.raw.txt.xz --tasks=arc_easy,boolq,hellaswag,piqa

For each of --seeds: trains the dense model of --config (or takes that of --dense), converts it by --methods
(of experiments/convert: into paths; with `_spent`, routers take the place of units, and units without one are
left out; with `_leaf`, into a leaf layer), and trains each further for --steps steps on the same text, in two
ways:

    tuned       by cross-entropy alone
    distilled   and towards the dense model: kl = ffn = a weight

The last method is also `faded`: as distilled, the dense layers fading out over the first half; and the dense
model is itself trained further as long (`dense_tuned_lr...`). Learning rate and weight are chosen first by
the validation loss of the last method's model at the first seed, by one rule for both: the rates --lrs and
beyond where the best is at an end; then distilled tries the other --weights, and tuned as many rates beside
its best one. `faded` takes what distilled has; `dense_tuned_lr...` what tuned has.

Dense, converted and fine-tuned models are scored on the validation text, on --texts, and on --tasks with and
without solved examples where --task_data names their data. What is in --workdir is not made again.
The last lines: perplexity against the dense model's, and the tokens of fine-tuning until it was within 2 %.

--jobs makes the parts (experiments/conversion/demo_parts.py) as processes, so many at a time, each with a log
in WORKDIR/logs. What waits for a part that failed is not made, and the exit code is 1; the same command goes
on.
"""

import importlib.util
import math
import os
import signal
import sys
import time
from typing import Any

import jax
from absl import flags

from experiments.common import cli, path_flags
from experiments.common.config_words import check_config
from experiments.common.processes import Job, Processes, stopped, why
from experiments.conversion import demo_scores, layer_flags
from experiments.conversion.demo_parts import Demo
from experiments.lm_harness import questions
from experiments.reporting import texts
from experiments.sweeps import tuning
from tree_ffn.conversion.convert import Recipe, check_convertible, tokens_needed
from tree_ffn.conversion.placement import METHODS
from tree_ffn.data import load_tokenizer
from tree_ffn.errors import InputError, check_choice, check_positive_int, is_whole_number
from tree_ffn.locks import only_writer
from tree_ffn.models.cost import total_units
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.spec import ModelSpec
from tree_ffn.plain import namespace
from tree_ffn.training import workdir as workdirs

_CONFIG = cli.define_config("config", "configs/quickstart.py:kind=dense", "The dense model and its training.")
_DENSE = path_flags.define("dense", None, "Workdir of a dense run, instead of training one for each seed.")
_WORKDIR = path_flags.define("workdir", "runs/convert_demo", "Where the runs go, one directory each.")
_LAYER = layer_flags.define(n_trees=3)
_METHODS = flags.DEFINE_list(
    "methods",
    ["random_leaf", "cluster_spent", "cluster", "cluster_leaf"],
    "Ways to convert; the last is tuned on.",
)
_REFITS = flags.DEFINE_list(
    "refits", ["0", "1", "3"], "How often output weights are solved for; all are measured, the last goes on."
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Calibration tokens.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of each fine-tuning.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, each with a dense model of its own.")
_LRS = flags.DEFINE_list("lrs", ["1e-3", "2e-3", "4e-3"], "Learning rates to choose from, at least three.")
_WEIGHTS = flags.DEFINE_list("weights", ["1", "0.3", "3"], "Weights of distillation to choose from.")
_TEXTS = flags.DEFINE_list("texts", [], texts.HELP)
_TASKS = flags.DEFINE_list(
    "tasks", ["arc_easy", "boolq", "hellaswag", "piqa"], "Tasks of experiments/lm_harness/tasks."
)
_TASK_DATA = path_flags.define(
    "task_data", None, "Folder with the data of the tasks; without it none is asked."
)
_TASK_CACHE = path_flags.define("task_cache", "data_cache/tasks", "Where task data are kept unpacked.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of a task; all by default.")
_RESULTS = path_flags.define_written("results", None, "Append all metrics to this results file (JSONL).")
_JOBS = flags.DEFINE_integer("jobs", 0, "Parts as processes, so many at a time; 0: one by one here.")
_GPUS = flags.DEFINE_list("gpus", [], "GPUs for --jobs to take in turns, e.g. 0,1; all see all by default.")
_PART = flags.DEFINE_string("part", None, "Make this part alone; --jobs starts processes so.")


def main() -> None:
    demo = checked_flags()
    if _PART.value:
        make_part(demo, _PART.value)
        return
    with only_writer(demo.workdir, "--workdir"):
        failed = make_all(demo)
    if failed:
        sys.exit(1)


def make_all(demo: Demo) -> dict[str, str]:
    """Makes what is left, and says what there is; {label: sentence} of the parts that failed."""
    failed = {}
    try:
        if _JOBS.value:
            failed = make_as_processes(demo)
        else:
            make_here(demo)
    finally:  # after a signal or a failure too: what there is so far
        said = ", ".join(f"{way}: lr {s.lr:g}, weight {s.weight:g}" for way, s in demo.chosen().items())
        print(f"\nchosen: {said}\n{table(demo.ended())}", flush=True)
    return failed


def make_here(demo: Demo) -> None:
    """Makes all parts one after the other; a failure ends it."""
    made: set[str] = set()
    while part := next((part for part in demo.ready() if part.label not in made), None):
        made.add(part.label)
        part.make()
        jax.clear_caches()  # compiled programs and their constants would pile up


def make_part(demo: Demo, label: str) -> None:
    """One part, as a process of --jobs does."""
    for part in demo.ready():
        if part.label == label:
            part.make()
            return
    raise InputError(f"--part: {label!r} is not allowed; it is done, or waits for others.")


def make_as_processes(demo: Demo) -> dict[str, str]:
    """Makes the parts as processes, several at a time; {label: sentence} of those that failed."""
    began, failed, clock = set(), {}, time.perf_counter()

    def next_job() -> Job | None:
        part = next((part for part in demo.ready() if part.label not in began), None)
        if part is None:
            return None
        began.add(part.label)
        words = ["experiments.convert_demo", *sys.argv[1:], f"--part={part.label}"]
        return Job(part.label, words, os.path.join(demo.workdir, "logs", f"{part.label}.txt"))

    def ended(job: Job, code: int, seconds: float) -> None:
        left = code or any(part.label == job.label for part in demo.ready())
        if left:
            failed[job.label] = why(job.log, code)
        said = f"FAILED: {failed[job.label]}" if left else "done"
        print(f"{time.perf_counter() - clock:6.0f} s  {job.label}: {said} in {seconds:.0f} s", flush=True)

    try:
        Processes(_JOBS.value, _GPUS.value).run(next_job, ended, "the demonstration")
    except KeyboardInterrupt:
        raise stopped(signal.SIGINT, "the demonstration") from None
    if failed:
        print(f"\n{len(failed)} parts failed; what waits for them was not made:", file=sys.stderr)
        for label, said in failed.items():
            print(f"  {label}: {said}", file=sys.stderr)
    return failed


def checked_flags() -> Demo:
    """What is asked for; all flags are looked at before any work, and no device."""
    for flag in (_STEPS, _TOKENS):
        check_positive_int(f"--{flag.name}", flag.value)
    seeds, refits = _whole(_SEEDS), _whole(_REFITS)
    config: Any = _CONFIG.value
    check_config(config)
    recipes = checked_recipes(dense_model(config), refits[-1])
    weights = _numbers(_WEIGHTS)
    grid = tuning.Grid.of({"values": _numbers(_LRS)})
    check_jobs()
    return Demo(
        _WORKDIR.value, config, _DENSE.value, recipes, refits, _TOKENS.value, _STEPS.value, seeds, grid,
        weights, _RESULTS.value, checked_scoring(),
    )  # fmt: skip


def dense_model(config) -> ModelSpec:
    """The dense model, of --dense or of --config."""
    if _DENSE.value:
        trained = workdirs.read_config(_DENSE.value)
        if trained is None:
            raise InputError(f"--dense: {_DENSE.value} holds no run; name the workdir of one.")
        config = namespace(trained)
    return model_spec_from_config(config, load_tokenizer(config.data.tokenizer).vocab_size)


def checked_recipes(dense: ModelSpec, refits: int) -> dict[str, Recipe]:
    """{method: how it converts}, all of which the dense model can be converted by."""
    if not _METHODS.value:
        raise InputError("--methods is empty; name at least one.")
    n_units, recipes = max(map(total_units, dense.ffns)), {}
    for name in _METHODS.value:
        method, _, end = name.partition("_")
        check_choice("--methods", name, [m + end for m in METHODS for end in ("", "_spent", "_leaf")])
        layer = _LAYER.leaves(n_units) if end == "leaf" else _LAYER.paths(end or "separate")
        recipes[name] = Recipe(layer, method, 0, refits, drop=end == "spent")
        check_convertible(dense, recipes[name])
        if _TOKENS.value < (needed := tokens_needed(layer)):
            raise InputError(
                f"--tokens: {_TOKENS.value:,} is not allowed; routers are fitted to 32 visits of every leaf, "
                f"which takes at least {needed:,} tokens for {name}."
            )
    return recipes


def check_jobs() -> None:
    """Raises InputError unless --jobs and --gpus say what can be done."""
    if _JOBS.value < 0:
        raise InputError(f"--jobs: {_JOBS.value} is not allowed; use at least 0.")
    if any(not is_whole_number(gpu) for gpu in _GPUS.value):
        raise InputError(f"--gpus: {','.join(_GPUS.value)!r} is not allowed; use numbers such as 0,1.")


def checked_scoring() -> demo_scores.Scoring:
    """What models are scored on."""
    if tasks_can_be_asked():
        questions.plan(_TASKS.value, "task", _TASK_DATA.value)
    elif _TASK_DATA.value:
        print(
            "no tasks are asked: the package lm_eval is not installed (pip install 'tree_ffn[eval]').",
            flush=True,
        )
    tasks = _TASKS.value if tasks_can_be_asked() else []
    return demo_scores.Scoring(
        texts.parse(_TEXTS.value), tasks, _TASK_DATA.value, _TASK_CACHE.value, _LIMIT.value
    )


def _whole(flag) -> list[int]:
    if not flag.value or not all(is_whole_number(word.strip()) for word in flag.value):
        raise InputError(
            f"--{flag.name}: {','.join(flag.value)!r} is not allowed; use whole numbers, e.g. 0,1."
        )
    return [int(word) for word in flag.value]


def _numbers(flag) -> list[float]:
    try:
        numbers = [float(word) for word in flag.value]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise InputError(f"--{flag.name}: {','.join(flag.value)!r} is not allowed; use numbers above 0.")
    return numbers


def tasks_can_be_asked() -> bool:
    return bool(_TASK_DATA.value) and importlib.util.find_spec("lm_eval") is not None


def table(found: dict[tuple[int, str], dict]) -> str:
    """Perplexities before and after, as multiples of the dense model's, and tokens until they were near."""
    lines = [f"{'perplexity / dense':<26}{'seed':>5}{'before':>9}{'after':>9}   tokens until within 2 %"]
    for (seed, row), figures in found.items():
        before, after = (math.exp(figures[name] - figures["teacher"]) for name in ("before", "after"))
        near = figures.get("tokens_until_near")
        said = f"{near:,.0f}" if near is not None else f"not in {figures['tokens']:,}"
        lines.append(f"{row:<26}{seed:>5}{before:>9.4f}{after:>9.4f}   {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
