"""What a demonstration of conversion consists of: parts, what each waits for, and which are done.

A part is done when its directory says so, so it does not matter which process makes it, or when:

    dense_seed0                     the dense model
    cluster_seed0                   a conversion of it
    cluster_tuned_lr0.001_seed0     a fine-tuning by which settings are chosen, at the first seed
    cluster_tuned_seed0             a fine-tuning with what was chosen, and its scores
    cluster_scores_seed0            scores of a model that is not trained further
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.common import provenance, run_config, starts
from experiments.conversion import demo_scores, finetuning
from experiments.conversion.converting import Sizes, convert_all, facts_of, name_of, row_of
from experiments.conversion.finetune_choice import Settings, choice, config_for
from experiments.reporting import record
from experiments.sweeps import sweep_runs, tuning
from tree_ffn.conversion.convert import Recipe, check_convertible
from tree_ffn.plain import namespace
from tree_ffn.training import workdir as workdirs
from tree_ffn.training.loop import train
from tree_ffn.training.plan import resolved
from tree_ffn.training.signals import Diverged

WAYS = ("tuned", "distilled")


class Part(NamedTuple):
    """A part that can be made now: its name, and what makes it."""

    label: str
    make: Callable[[], None]


class Tuned(NamedTuple):
    """A fine-tuning with chosen settings; `faded`: dense layers fade out of it."""

    row: str
    start: str
    settings: Settings
    faded: bool = False


@dataclasses.dataclass(frozen=True)
class Demo:
    """A demonstration.

    Attributes:
      workdir: where the runs go.
      config: of the dense model's training.
      dense: workdir of a dense run instead, or None.
      recipes: {method: how it converts}, the last is tuned on.
      refits: how often output weights are solved for; all are measured.
      tokens: to calibrate on.
      steps: of each fine-tuning.
      seeds: each has a dense model of its own.
      grid, weights: what is tried (see `choice`).
      results: file of the results; None writes none.
      scoring: what models are scored on.
    """

    workdir: str
    config: Any
    dense: str | None
    recipes: dict[str, Recipe]
    refits: list[int]
    tokens: int
    steps: int
    seeds: list[int]
    grid: tuning.Grid
    weights: list[float]
    results: str | None
    scoring: demo_scores.Scoring

    def ready(self) -> list[Part]:
        """The parts that are not done and wait for nothing; first those for which most others wait."""
        parts, last = [], list(self.recipes)[-1]
        for seed in self.seeds:
            if not self.dense and not done(self.dense_of(seed)):
                parts.append(Part(f"dense_seed{seed}", functools.partial(self.train_dense, seed)))
                continue
            for name, recipe in self.recipes.items():
                if not converted(self.place_of(name, seed)):
                    part = Part(f"{name}_seed{seed}", functools.partial(self.convert, name, recipe, seed))
                    parts.insert(0, part) if name == last else parts.append(part)
        parts[:0] = self.tuning_left()
        chosen = self.chosen()
        for seed in self.seeds:
            parts += (
                Part(f"{run.row}_seed{seed}", functools.partial(self.make_row, run, seed))
                for run in self.runs_of(seed, chosen)
                if not self.scoring.done(self.workdir_of(run, seed))
            )
            parts += (
                Part(f"{name}_scores_seed{seed}", functools.partial(self.score, row, workdir))
                for name, row, workdir in self.untrained(seed)
                if not self.scoring.done(workdir)
            )
        return parts

    def directory(self, seed: int) -> str:
        """Where the runs of a seed go."""
        return os.path.join(self.workdir, f"seed{seed}")

    def dense_of(self, seed: int) -> str:
        """The workdir of the dense model of a seed."""
        return self.dense or os.path.join(self.directory(seed), f"dense_{digest(self.dense_config(seed))}")

    def dense_config(self, seed: int):
        """The config of the dense model of a seed."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return config

    def place_of(self, name: str, seed: int) -> str:
        """The workdir of a conversion."""
        recipe = self.recipes[name]._replace(seed=seed)
        facts = {**facts_of(recipe), "tokens": self.tokens, "dense": os.path.basename(self.dense_of(seed))}
        return os.path.join(self.directory(seed), f"{name}_{digest(facts)}")

    def train_dense(self, seed: int) -> None:
        """Trains the dense model of a seed, or goes on with it."""
        config, workdir = self.dense_config(seed), self.dense_of(seed)
        print(f"\ndense, seed {seed}: {config.train.steps} steps in {workdir}", flush=True)
        set_done(workdir, train(config, workdir, origin=provenance.origin))

    def convert(self, name: str, recipe: Recipe, seed: int) -> None:
        """Converts the dense model of a seed."""
        recipe, place = recipe._replace(seed=seed), self.place_of(name, seed)
        run, text = starts.with_text(starts.load(self.dense_of(seed)))
        check_convertible(run.model, recipe)
        print(f"\n{name}, seed {seed}:", flush=True)
        shutil.rmtree(place, ignore_errors=True)  # what an earlier process did not write to its end
        sizes = Sizes(self.tokens, min(self.tokens, 8192))
        tried = [recipe._replace(refits=n) for n in self.refits]
        convert_all(run, text, tried, sizes, to={recipe: place}, results=self.results)

    def tuning_left(self) -> list[Part]:
        """What has to be tried next in each way, once the last method's model of the first seed is there."""
        seed, name = self.seeds[0], list(self.recipes)[-1]
        if not converted(self.place_of(name, seed)):
            return []
        parts = []
        for way in WAYS:
            for settings in self.choice(way)[1]:
                label = f"{self.tuning_row(way, settings)}_lr{settings.lr:g}_seed{seed}"
                parts.append(Part(label, functools.partial(self.tune, way, settings)))
        return parts

    def choice(self, way: str) -> tuple[Settings | None, list[Settings]]:
        """(the settings of a way, None while they are open; what has to be tried before)."""
        known = lambda settings: self.tuning_loss(way, settings)
        return choice(known, self.grid, self.weights, way == "distilled")

    def chosen(self) -> dict[str, Settings]:
        """{way: its settings} of the ways that are decided."""
        if not converted(self.place_of(list(self.recipes)[-1], self.seeds[0])):
            return {}
        found = {way: self.choice(way)[0] for way in WAYS}
        return {way: settings for way, settings in found.items() if settings}

    def tuning_row(self, way: str, settings: Settings) -> str:
        """The name of a fine-tuning by which settings are chosen."""
        name = name_of(list(self.recipes.values())[-1])
        return f"{name}_{way}" + (f"_weight{settings.weight:g}" if settings.weight else "")

    def tuning_run(self, way: str, settings: Settings):
        """(workdir, config) of a fine-tuning by which settings are chosen."""
        seed, name = self.seeds[0], list(self.recipes)[-1]
        config = config_for(
            self.dense_of(seed), self.place_of(name, seed), settings, steps=self.steps, seed=seed
        )
        row = self.tuning_row(way, settings)
        return os.path.join(self.directory(seed), "tuning", f"{row}_{digest(config)}"), config

    def tuning_loss(self, way: str, settings: Settings) -> float | None:
        """The validation loss of settings, inf where they diverged; None where they were not tried."""
        figures = done(self.tuning_run(way, settings)[0])
        return None if figures is None else figures.get("after", math.inf)

    def tune(self, way: str, settings: Settings) -> None:
        """A fine-tuning by which settings are chosen; recorded in a file of its own."""
        workdir, config = self.tuning_run(way, settings)
        results = sweep_runs.tuning_path(self.results) if self.results else None
        try:
            fine_tune(workdir, config, self.tuning_row(way, settings), results)
        except Diverged as error:  # an answer: the rate is too high
            print(error, flush=True)
            set_done(workdir, {"diverged": str(error)})

    def runs_of(self, seed: int, chosen: dict[str, Settings]) -> Iterator[Tuned]:
        """Every fine-tuning of a seed whose start is there and whose settings are chosen."""
        places = {name: self.place_of(name, seed) for name in self.recipes}
        for name, place in places.items():
            if converted(place):
                row = name_of(self.recipes[name])
                yield from (Tuned(f"{row}_{way}", place, settings) for way, settings in chosen.items())
        name, place = list(places.items())[-1]
        if converted(place) and "distilled" in chosen:
            yield Tuned(f"{name_of(self.recipes[name])}_faded", place, chosen["distilled"], True)
        if "tuned" in chosen and (self.dense or done(self.dense_of(seed))):
            lr = chosen["tuned"].lr  # other layers may be tuned on beside it, at other rates
            yield Tuned(f"dense_tuned_lr{lr:g}", self.dense_of(seed), chosen["tuned"])

    def config_of(self, run: Tuned, seed: int):
        """The config of a fine-tuning with chosen settings."""
        return config_for(
            self.dense_of(seed), run.start, run.settings, steps=self.steps, seed=seed, faded=run.faded
        )

    def workdir_of(self, run: Tuned, seed: int) -> str:
        """The workdir of a fine-tuning with chosen settings."""
        return os.path.join(self.directory(seed), f"{run.row}_{digest(self.config_of(run, seed))}")

    def make_row(self, run: Tuned, seed: int) -> None:
        """A fine-tuning with chosen settings, and its scores."""
        config, workdir = self.config_of(run, seed), self.workdir_of(run, seed)
        if not done(workdir):
            fine_tune(workdir, config, run.row, self.results)
        facts = run_config.finetuned_config(config, starts.load(run.start))
        demo_scores.score(self.scoring, workdir, run.row, self.results, facts)

    def untrained(self, seed: int) -> Iterator[tuple[str, str, str]]:
        """(name, row, workdir) of the models of a seed that are there and not trained further."""
        dense = self.dense_of(seed)
        if self.dense or done(dense):
            yield "dense", "dense", dense
        for name, recipe in self.recipes.items():
            if converted(self.place_of(name, seed)):
                yield name, row_of(recipe), self.place_of(name, seed)

    def score(self, row: str, workdir: str) -> None:
        """Scores of a model that is not trained further."""
        facts = None if row == "dense" else converted_config(workdir)
        demo_scores.score(self.scoring, workdir, row, self.results, facts)

    def ended(self) -> dict[tuple[int, str], dict]:
        """{(seed, row): figures} of the fine-tunings with chosen settings that are done."""
        found, chosen = {}, self.chosen()
        for seed in self.seeds:
            for run in self.runs_of(seed, chosen):
                if figures := done(self.workdir_of(run, seed)):
                    found[seed, run.row] = figures
        return found

    def models(self) -> Iterator[tuple[str, str]]:
        """(row, workdir) of every model that is there and was scored, or will be."""
        chosen = self.chosen()
        for seed in self.seeds:
            yield from ((row, workdir) for _, row, workdir in self.untrained(seed))
            yield from ((run.row, self.workdir_of(run, seed)) for run in self.runs_of(seed, chosen))


def fine_tune(workdir: str, config, row: str, results: str | None) -> None:
    """A fine-tuning; its figures are left in done.json: of teacher, start and end, and tokens until near."""
    print(f"\n{row}: {config.train.steps} steps, lr {config.optim.lr:g}, weight {config.finetune.kl:g}",
          flush=True)  # fmt: skip
    before, after = finetuning.finetune(config, workdir, results=results, row=row)
    losses = {name: figures["loss"] for name, figures in before.items()} | {"after": after["loss"]}
    set_done(workdir, losses | {key: after[key] for key in ("tokens", "tokens_until_near") if key in after})


def converted_config(workdir: str):
    """What the rows of a conversion say of it, as `convert_all` does."""
    run = starts.load(workdir)
    facts = {name: value for name, value in run.meta["converted"].items() if name != "step"}
    return namespace({**resolved(run.config), "seed": facts["seed"], "convert": facts})


def converted(workdir: str) -> bool:
    """Whether a conversion was written to its end, which is its config."""
    return workdirs.read_json(workdir, "config.json") is not None


def digest(config) -> str:
    """8 hex digits: runs of other settings have other directories."""
    return record.config_hash(config)[:8]


def done(workdir: str) -> dict | None:
    """Figures of a run that ended; None if it has not."""
    return workdirs.read_json(workdir, "done.json")


def set_done(workdir: str, figures: dict) -> None:
    workdirs.write_json(workdir, "done.json", figures)
