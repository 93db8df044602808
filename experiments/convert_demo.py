"""From a dense model to trees and back to its loss: converts, fine-tunes with and without a teacher, scores.

    python -m experiments.convert_demo --workdir=runs/demo --results=runs/conversion.jsonl
    python -m experiments.convert_demo --dense=runs/dense --seeds=0,1,2 --task_data=DATA \
        --texts=wikitext2=wikitext2/test.raw.txt.xz --tasks=arc_easy,boolq,hellaswag,piqa

For each of --seeds: trains the dense model of --config (or takes that of --dense), converts it by --methods
(of experiments/convert; with `_spent`, routers take the place of units, and units without one are left out)
into trees of one shape, and trains each further for --steps steps on the same text, in two ways:

    tuned       by cross-entropy alone
    distilled   and towards the dense model: kl = ffn = a weight

The last method is also `faded`: as distilled, the dense layers fading out over the first half; and the dense
model is itself trained further as long (`dense_tuned`). Learning rate and weight are chosen first by the
validation loss of the last method's trees at the first seed, by one rule for both: the rates --lrs and
beyond where the best is at an end; then distilled tries the other --weights, and tuned as many rates beside
its best one. `faded` takes what distilled has; `dense_tuned` what tuned has.

Dense, converted and fine-tuned models are scored on the validation text, on --texts, and on --tasks with and
without solved examples where --task_data names their data. What is in --workdir is not made again. The last
lines: perplexity against the dense model's, and the tokens of fine-tuning until it was within 2 %.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator

import jax
from absl import flags
from ml_collections import config_flags

from experiments import (
    cli,
    finetuning,
    loaded,
    provenance,
    questions,
    record,
    starts,
    sweep_runs,
    texts,
    tuning,
)
from experiments.config_words import check_config
from experiments.converting import Sizes, convert_all, facts_of, row_of
from experiments.finetune_choice import Settings, choose, config_for
from tree_ffn.analysis.convert import Recipe, check_convertible, tokens_needed
from tree_ffn.analysis.placement import METHODS
from tree_ffn.errors import InputError, check_choice, check_positive_int
from tree_ffn.training import workdir as workdirs
from tree_ffn.training.config import namespace, resolved
from tree_ffn.training.loop import train
from tree_ffn.training.setup import plan_run
from tree_ffn.tree import TreeShape

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/quickstart.py:kind=dense", "The dense model and its training.", lock_config=True
)
_DENSE = flags.DEFINE_string("dense", None, "Workdir of a dense run, instead of training one for each seed.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/convert_demo", "Where the runs go, one directory each.")
_N_TREES = flags.DEFINE_integer("n_trees", 2, "P, trees of a layer.")
_DEPTH = flags.DEFINE_integer("depth", 7, "D, decisions of a path.")
_NODE_WIDTH = flags.DEFINE_list("node_width", ["1"], "W, units of a node: one number, or one for each level.")
_SHARED_WIDTH = flags.DEFINE_integer("shared_width", 0, "S, units that are always on.")
_METHODS = flags.DEFINE_list(
    "methods", ["random", "frequency", "cluster_spent", "cluster"], "Ways to convert; the last is tuned on."
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
_TASKS = flags.DEFINE_list("tasks", ["arc_easy", "boolq", "hellaswag", "piqa"], "Tasks of experiments/tasks.")
_TASK_DATA = flags.DEFINE_string(
    "task_data", None, "Folder with the data of the tasks; without it none is asked."
)
_TASK_CACHE = flags.DEFINE_string("task_cache", "data_cache/tasks", "Where task data are kept unpacked.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of a task; all by default.")
_RESULTS = flags.DEFINE_string("results", None, "Append all figures to this results file (JSONL).")


def main() -> None:
    recipes, seeds, grid, weights = checked_flags()
    chosen, found = {}, {}
    for seed in seeds:
        base = os.path.join(_WORKDIR.value, f"seed{seed}")
        dense = _DENSE.value or train_dense(base, seed)
        places = convert_dense(base, dense, recipes, seed)
        score(dense, "dense")
        for name, place in places.items():
            score(place, row_of(recipes[name]), converted_config(place))
        if not chosen:
            chosen = choose(tuner(base, dense, places, seed), grid, weights)
        for row, start, settings, faded in runs_of(dense, places, chosen):
            config = config_for(dense, start, settings, steps=_STEPS.value, seed=seed, faded=faded)
            found[seed, row] = figures = fine_tune(os.path.join(base, row), config, row, _RESULTS.value)
            score(figures["workdir"], row, finetuning.facts_of(config, starts.load(start)))
    said = ", ".join(f"{way}: lr {s.lr:g}, weight {s.weight:g}" for way, s in chosen.items())
    print(f"\nchosen: {said}\n{table(found)}")


def runs_of(dense: str, places: dict[str, str], chosen: dict[str, Settings]) -> Iterator[tuple]:
    """(row, start, settings, whether dense layers fade out) of every fine-tuning of a seed."""
    for name, place in places.items():
        for way, settings in chosen.items():
            yield f"{name}_{way}", place, settings, False
    name, place = list(places.items())[-1]
    yield f"{name}_faded", place, chosen["distilled"], True
    yield "dense_tuned", dense, chosen["tuned"], False


def tuner(base: str, dense: str, places: dict[str, str], seed: int) -> Callable[[str, Settings], float]:
    """(way, settings) to the validation loss of the last method's trees; recorded in a file of its own."""
    name, place = list(places.items())[-1]
    results = sweep_runs.tuning_path(_RESULTS.value) if _RESULTS.value else None

    def tune(way: str, settings: Settings) -> float:
        row = f"{name}_{way}" + (f"_weight{settings.weight:g}" if settings.weight else "")
        config = config_for(dense, place, settings, steps=_STEPS.value, seed=seed)
        return fine_tune(os.path.join(base, "tuning", row), config, row, results)["after"]

    return tune


def checked_flags() -> tuple[dict[str, Recipe], list[int], tuning.Grid, list[float]]:
    """{method: recipe}, seeds, learning rates and weights; all flags are looked at before any work."""
    for flag in (_STEPS, _TOKENS):
        check_positive_int(f"--{flag.name}", flag.value)
    seeds, widths, refits = (_whole(flag) for flag in (_SEEDS, _NODE_WIDTH, _REFITS))
    shape = TreeShape(
        _N_TREES.value, _DEPTH.value, widths[0] if len(widths) == 1 else tuple(widths), _SHARED_WIDTH.value
    )
    if _TOKENS.value < tokens_needed(shape):
        raise InputError(
            f"--tokens: {_TOKENS.value:,} is not allowed; depth {shape.depth} takes at least "
            f"{tokens_needed(shape):,} (32 * 2^{shape.depth}) to fit its routers."
        )
    recipes = {}
    for name in _METHODS.value:
        method, _, spent = name.partition("_")
        check_choice("--methods", name, [m + end for m in METHODS for end in ("", "_spent")])
        recipes[name] = Recipe(shape, method, spent or "separate", 0, refits[-1], drop=bool(spent))
    if not recipes:
        raise InputError("--methods is empty; name at least one.")
    weights = _numbers(_WEIGHTS)
    grid = tuning.Grid.of({"values": _numbers(_LRS)})
    texts.parse(_TEXTS.value)
    check_config(_CONFIG.value)
    if not _DENSE.value:
        for recipe in recipes.values():
            check_convertible(plan_run(_CONFIG.value).model, recipe)
    if tasks_can_be_asked():
        questions.plan(_TASKS.value, "task", _TASK_DATA.value)
    elif _TASK_DATA.value:
        print("no tasks are asked: the package lm_eval is not installed (requirements-eval.txt).", flush=True)
    return recipes, seeds, grid, weights


def _whole(flag) -> list[int]:
    if not flag.value or not all(word.strip().isdecimal() for word in flag.value):
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


def train_dense(base: str, seed: int) -> str:
    """The workdir of the dense run of a seed; trained, or gone on with, unless it is done."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.seed = seed
    workdir = os.path.join(base, f"dense_{digest(config)}")
    if not done(workdir):
        print(f"\ndense, seed {seed}: {config.train.steps} steps in {workdir}", flush=True)
        set_done(workdir, train(config, workdir, origin=provenance.origin))
        jax.clear_caches()
    return workdir


def convert_dense(base: str, dense: str, recipes: dict[str, Recipe], seed: int) -> dict[str, str]:
    """{method: workdir} of the conversions of a dense run."""
    places = {}
    for name, recipe in recipes.items():
        recipe = recipe._replace(seed=seed)
        facts = {**facts_of(recipe), "tokens": _TOKENS.value, "dense": os.path.basename(dense)}
        places[name] = os.path.join(base, f"{name}_{digest(facts)}")
        if os.path.exists(places[name]):
            continue
        run, text = starts.with_text(starts.load(dense))
        check_convertible(run.model, recipe)
        print(f"\n{name}, seed {seed}:", flush=True)
        sizes = Sizes(_TOKENS.value, min(_TOKENS.value, 8192))
        tried = [recipe._replace(refits=n) for n in _whole(_REFITS)]
        convert_all(run, text, tried, sizes, to={recipe: places[name]}, results=_RESULTS.value)
        jax.clear_caches()
    return places


def fine_tune(place: str, config, row: str, results: str | None) -> dict:
    """Figures of a fine-tuning, made unless it is done: of teacher, start and end, and tokens until near."""
    workdir = f"{place}_{digest(config)}"
    if not done(workdir):
        print(f"\n{row}: {config.train.steps} steps, lr {config.optim.lr:g}, weight {config.finetune.kl:g}",
              flush=True)  # fmt: skip
        before, after = finetuning.finetune(config, workdir, results=results, row=row)
        losses = {name: figures["loss"] for name, figures in before.items()} | {"after": after["loss"]}
        tokens = {name: after[name] for name in ("tokens", "tokens_until_near") if name in after}
        set_done(workdir, losses | tokens)
        jax.clear_caches()
    return {**(done(workdir) or {}), "workdir": workdir}


def score(workdir: str, row: str, config=None) -> None:
    """Scores a model on --texts and, with --task_data, on --tasks, once.

    Args:
      workdir: of the run.
      row: name of the rows.
      config: what the rows say of it; by default the run's.
    """
    others, tasks = texts.parse(_TEXTS.value), _TASKS.value if tasks_can_be_asked() else []
    asked = {"texts": sorted(others), "tasks": tasks, "limit": _LIMIT.value}
    if workdirs.read_json(workdir, "scored.json") == asked:
        return
    run = starts.load(workdir, "latest")
    if others:
        print(f"\n{row}:", flush=True)
        texts.score(
            run._replace(config=config or run.config), others, tokenizer=run.config.data.tokenizer,
            results=_RESULTS.value, table="conversion", row=row,
        )  # fmt: skip
    for shots in ("0", "task") if tasks else ():
        planned = questions.plan(tasks, shots, _TASK_DATA.value)
        model = loaded.load(workdir, None, step="latest")
        scores = questions.answer(
            model, planned, data=_TASK_DATA.value, cache=_TASK_CACHE.value, limit=_LIMIT.value
        )
        print(f"\n{row}, shots: {shots}\n{questions.table(scores)}", flush=True)
        if _RESULTS.value:
            facts = record.public_config(config or run.config, run.meta["data"])
            questions.append(_RESULTS.value, scores, facts, row, _LIMIT.value)
    workdirs.write_json(workdir, "scored.json", asked)
    jax.clear_caches()


def converted_config(workdir: str):
    """What the rows of a conversion say of it, as `convert_all` does."""
    run = starts.load(workdir)
    facts = {name: value for name, value in run.meta["converted"].items() if name != "step"}
    return namespace({**resolved(run.config), "convert": facts})


def tasks_can_be_asked() -> bool:
    return bool(_TASK_DATA.value) and importlib.util.find_spec("lm_eval") is not None


def digest(config) -> str:
    """8 hex digits: runs of other settings have other directories."""
    return record.config_hash(config)[:8]


def done(workdir: str) -> dict | None:
    """Figures of a run that ended; None if it has not."""
    return workdirs.read_json(workdir, "done.json")


def set_done(workdir: str, figures: dict) -> None:
    workdirs.write_json(workdir, "done.json", figures)


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
