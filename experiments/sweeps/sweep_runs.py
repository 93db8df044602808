"""The runs that a sweep asks for: which there are, which are done, and which learning rate each takes."""

import functools
import math
import os
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.common import run_config
from experiments.common.config_words import config_of, words_of
from experiments.conversion.finetuning import finetune_spec, load_start, on_text_of, prepare_rows
from experiments.reporting import record
from experiments.reporting.aggregate import NO_MATTER, telling_differences
from experiments.sweeps import tuning
from experiments.sweeps.sweep import Row, Sweep
from tree_ffn.data import corpus_spec_from_config, prepare
from tree_ffn.data.tokenizers import load_tokenizer
from tree_ffn.models import cost
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.spec import ModelSpec
from tree_ffn.training.plan import many_passes, settled, train_spec
from tree_ffn.training.restore import Restored
from tree_ffn.upgrades import stamped


class Run(NamedTuple):
    """One run of training or fine-tuning.

    Attributes:
      table, name, seed: of its results rows.
      config: as its program reads it from `words`.
      words: the part of the command line that says the config.
      workdir, results: where it goes.
      texts: other texts to score at its end, the words of --texts.
      start: what fine-tuning begins with, without its weights; None: it is training.
    """

    table: str
    name: str
    seed: int
    config: Any
    words: list[str]
    workdir: str
    results: str
    texts: tuple[str, ...] = ()
    start: Restored | None = None

    @property
    def label(self) -> str:
        """What people call it: `dense_seed0`, or `dense_lr0.002_seed0` of a grid."""
        return os.path.basename(self.workdir)

    @property
    def program(self) -> str:
        """Which of experiments/ makes it."""
        return "finetune" if self.start else "train"

    def arguments(self) -> list[str]:
        """All words after `python -m experiments.PROGRAM`."""
        names = {"workdir": self.workdir, "results": self.results, "table": self.table, "row": self.name}
        if self.texts:
            names["texts"] = ",".join(self.texts)
        return [*self.words, *(f"--{key}={value}" for key, value in names.items())]

    def command(self) -> str:
        """The line for a shell that makes this run."""
        return shlex.join(["python", "-m", f"experiments.{self.program}", *self.arguments()])

    def tokens(self) -> int:
        """How many tokens it trains on."""
        return self.config.train.steps * self.config.train.batch_size * self.model().max_seq_len

    def model(self) -> ModelSpec:
        """What it trains."""
        if self.start:
            return self.start.model
        return model_spec_from_config(self.config, vocabulary(self.config.data.tokenizer))

    def facts(self) -> dict:
        """What is known of its text, which is prepared if it is not yet."""
        if self.start and self.config.finetune.task == "qa":
            return prepare_rows(self.config, self.start.model, spec=finetune_spec(self.config)).meta
        return _facts(corpus_spec_from_config(self.config), self.model().max_seq_len + 1)

    def recorded(self) -> dict:
        """The config that its results rows have."""
        config = run_config.finetuned_config(self.config, self.start) if self.start else self.config
        return record.public_config(config, self.facts())

    def passes(self) -> float:
        """How often it reads its training text, which is prepared if it is not yet."""
        return train_spec(self.config).passes(self.facts()["splits"]["train"]["rows"])


RATE = 2.5e14  # FLOPs a second: T1-small's steps on an H200 reach 210 (sparse) to 320 (dense) TFLOP/s


@functools.cache
def vocabulary(tokenizer: str) -> int:
    """How many tokens a tokenizer of a config has."""
    return load_tokenizer(tokenizer).vocab_size


def needs(runs: list[Run]) -> str:
    """Arithmetic, hours and memory of runs, one after the other, as text."""
    models = [run.model() for run in runs]
    # Forward and twice as much backward; `masked` computes what a dense layer of all units does.
    flops = sum(
        3 * cost.model_flops(cost.dense_counterpart(model)) * run.tokens() for run, model in zip(runs, models)
    )
    most = max(cost.sizes(model)["bytes_training"] for model in set(models))
    return (
        f"{flops / 1e15:,.1f} PFLOP with every unit computed: {flops / RATE / 3600:.1f} hours of an H200 at "
        f"{RATE / 1e12:.0f} TFLOP/s; weights, gradients and moments take "
        f"{most / 1e9:.1f} GB at most, activations apart (experiments.plan "
        "has them)"
    )


class Known:
    """Validation losses that a results file has, by what was run (see `same_run`)."""

    def __init__(self, path: str):
        rows = record.load_results([path]) if os.path.exists(path) else []
        self._rows: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["metric"] == "val_loss":
                self._rows.setdefault((row["table"], row["row"], row["seed"]), []).append(row)

    def loss(self, run: Run) -> float | None:
        """The last recorded validation loss of this very run; None if it has not been made."""
        rows = self._rows.get((run.table, run.name, run.seed), [])
        if not rows:  # before any text is looked at
            return None
        wanted = run.recorded()
        return next((row["value"] for row in reversed(rows) if same_run(row["config"], wanted)), None)


def same_run(recorded: dict, wanted: dict) -> bool:
    """Whether a recorded config, text included, computes what the wanted one, of today, does.

    More than equal hashes: keys that change no figure may differ (`lines.NO_MATTER`), and their versions (see
    `tree_ffn/upgrades.py`).
    """
    return all(re.match(NO_MATTER, key) for key in telling_differences(recorded, stamped(wanted)))


@functools.cache
def _facts(spec, row_tokens: int) -> dict:
    return prepare(spec, row_tokens).meta


def begun_with(config) -> Restored:
    """What a config of fine-tuning begins with, without its weights.

    Raises:
      InputError: it is not there, or cannot be trained so.
    """
    finetune_spec(config)
    return _begun_with(config.finetune.start, config.finetune.step)


@functools.cache
def _begun_with(start: str, step: str) -> Restored:
    return load_start(start, step)._replace(variables={})


def tuning_path(results: str) -> str:
    """Where the runs that choose learning rates are recorded; experiments/tables.py knows them by the name.

    Example:
      >>> tuning_path("results/t1_small.jsonl")
      'results/t1_small_tuning.jsonl'
    """
    stem, extension = os.path.splitext(results)
    return results if stem.endswith("_tuning") else f"{stem}_tuning{extension}"


class Ablation:
    """The runs of a sweep: which there are, which are done, what learning rate each takes.

    Args:
      sweep: its rows.
      wanted: of the rows that are to be run.
      workdir: directory of the runs.
      results: file of the results.
      texts: other texts that every row is scored on, the words of --texts.

    Attributes:
      broken: {kind: why} of the kinds whose rate could not be chosen.
    """

    def __init__(self, sweep: Sweep, wanted: Callable[[str], bool], workdir: str, results: str, texts=()):
        self.texts = tuple(texts)
        self.sweep, self._workdir, self.results = sweep, workdir, results
        self.rows = [row for row in sweep.rows if wanted(row.name)]
        self.broken: dict[str, str] = {}
        self._diverged: set[str] = set()

    def kinds(self) -> dict[str, Row]:
        """{kind: the first of its rows in the sweep}, which tries the rates, wanted itself or not."""
        first: dict[str, Row] = {}
        for row in self.sweep.rows:
            first.setdefault(row.kind, row)
        return {row.kind: first[row.kind] for row in self.rows}

    def tuning_run(self, kind: str, value: float, seed: int) -> Run:
        """One point of a kind's grid.

        Args:
          kind: of layers.
          value: of the grid's key.
          seed: of the run.
        """
        assert self.sweep.grid is not None
        key = self.sweep.grid.key
        values = self.kinds()[kind].values | self.sweep.tuning_set | {key: value}
        place = os.path.join("tuning", f"{kind}_{key.rsplit('.', 1)[-1]}{value:g}")
        return self._run(kind, seed, values, place, tuning_path(self.results))

    def _run(self, name: str, seed: int, values: dict, place: str, results: str) -> Run:
        values = {
            key: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
            for key, value in values.items()
        }
        words = [*words_of(self.sweep.config_file, values), f"--config.seed={seed}"]
        workdir, config, start = os.path.join(self._workdir, f"{place}_seed{seed}"), config_of(words), None
        if "finetune" in config:
            start = begun_with(config)
            config = on_text_of(start, config)
        return Run(self.sweep.table, name, seed, settled(config), words, workdir, results, start=start)

    def losses(self, kind: str, known: Known) -> tuple[dict[float, float], list[Run]]:
        """({value: mean loss over the seeds} of the values tried so far, the runs that come next)."""
        grid, losses = self.sweep.grid, {}
        assert grid is not None
        while values := tuning.next_values(losses, grid):
            missing = []
            for value in values:
                runs = [self.tuning_run(kind, value, seed) for seed in self.sweep.tuning_seeds]
                found = {run.seed: self._loss(run, known) for run in runs}
                missing += [run for run in runs if found[run.seed] is None]
                measured = [loss for loss in found.values() if loss is not None]
                if len(measured) == len(runs):
                    losses[value] = sum(measured) / len(runs)
            if missing:
                return losses, missing
        return losses, []

    def _loss(self, run: Run, known: Known) -> float | None:
        return float("inf") if run.workdir in self._diverged else known.loss(run)

    def tuning_left(self) -> list[Run]:
        """The runs that are next in choosing rates; a kind of which every run diverged is `broken`."""
        assert self.sweep.grid is not None
        known, left = Known(tuning_path(self.results)), []
        for kind in self.kinds():
            if kind not in self.broken:
                losses, missing = self.losses(kind, known)
                left += missing
                if not missing and not math.isfinite(min(losses.values())):
                    said = f"every run of their grid diverged, down to {self.sweep.grid.key} {min(losses):g}"
                    self.broken[kind] = said
        return left

    def note_failure(self, run: Run, said: str) -> bool:
        """Whether a failed run of a grid is an answer: it diverged, so its rate is too high.

        Any other failure leaves its kind without a choice.
        """
        if re.search(r"^step \d+: .* (nan|inf)\b", said):
            self._diverged.add(run.workdir)
            return True
        self.broken[run.name] = "a run of their grid of learning rates failed"
        return False

    def row_runs(self) -> tuple[list[Run], list[str]]:
        """(every run of the rows, lines that say which learning rates they take and why)."""
        chosen, lines = self._choices()
        runs = []
        for row in self.rows:
            values = row.values | chosen.get(row.kind, {})
            made = [self._run(row.name, seed, values, row.name, self.results) for seed in row.seeds]
            runs += [run._replace(texts=self.texts) for run in made]
        return runs, lines

    def _choices(self) -> tuple[dict[str, dict[str, float]], list[str]]:
        """({kind: {tuned key: best value}}, a line on each); kinds without a whole grid have none."""
        chosen, lines, without = {}, [], []
        grid = self.sweep.grid
        if grid is None:
            return {}, []
        known = Known(tuning_path(self.results))
        for kind in self.kinds():
            if kind in self.broken:
                continue
            losses, missing = self.losses(kind, known)
            if missing:
                without.append(kind)
                continue
            best = tuning.best_value(losses)
            chosen[kind] = {grid.key: best}
            edge = ", at the edge of all that was tried" if tuning.at_edge(losses) else ""
            tried = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in sorted(losses.items()))
            lines.append(f"{kind}: {grid.key} {best:g}{edge} ({tried})")
        if without:
            said = f"{grid.key} as in the config, for want of a whole grid (--tune runs it)"
            lines.append(f"{len(without)} of {len(self.kinds())} kinds: {said}")
        return chosen, lines

    def left(self, runs: list[Run]) -> list[Run]:
        """Those that are not in the results yet, and whose kind could be tuned."""
        known = Known(self.results)
        kinds = {row.name: row.kind for row in self.rows}
        return [run for run in runs if kinds[run.name] not in self.broken and known.loss(run) is None]

    def outlook(self, tune: bool) -> str:
        """What would run, as text."""
        runs, lines = self.row_runs()
        left = {id(run) for run in self.left(runs)}
        said = [f"sweep of {self.sweep.config_file}, table {self.sweep.table}", *lines]
        tokens = sum(run.tokens() for run in runs if id(run) in left)
        first = self.tuning_left() if tune else []
        if tune:
            said += [f"  to do: {run.label}, {run.config.train.steps} steps" for run in first]
            said.append(f"{len(first)} runs to choose a rate by, more where a best stands at its grid's edge")
            tokens += sum(run.tokens() for run in first)
        for run in runs:
            config = run.config
            state = "to do" if id(run) in left else "done"
            said.append(f"  {state:>5}: {run.label}, lr {config.optim.lr:g}, {config.train.steps} steps")
        todo = [run for run in runs if id(run) in left] + first
        passes = max((run.passes() for run in todo), default=0.0)
        said.append(
            f"{len(runs)} runs, {len(left)} to do; {tokens / 1e6:,.0f} M tokens to train on in all, "
            f"{passes:.1f} passes over its text in the longest run"
        )
        if todo:
            said.append(needs(todo))
        return "\n".join([*said, *filter(None, [many_passes(passes)])])
