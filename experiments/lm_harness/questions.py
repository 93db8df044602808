"""Question answering by EleutherAI's harness: tasks run on a model, scores beside what chance gives."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import os
import statistics
from typing import NamedTuple

from experiments.common.loaded import Loaded
from experiments.lm_harness import task_files
from experiments.lm_harness.kept import Kept
from experiments.reporting import record
from tree_ffn.errors import InputError, check_positive_int, is_whole_number, reason
from tree_ffn.json_output import number_or_none


class TaskScore(NamedTuple):
    """One metric of one task.

    Attributes:
      task, metric: their names.
      shots: examples in a prompt.
      value, stderr: the score and its standard error; NaN for none.
      chance: what guessing would score; None where that says nothing.
      n: questions.
      sha256: 12 digits of the task's definition.
      asked_sha256: of what was asked: every row, prompt and answer, by the harness's own hashes.
      data_sha256: of the task's data; None of data from the network.
      kept: what the context had room for.
    """

    task: str
    metric: str
    shots: int
    value: float
    stderr: float
    chance: float | None
    n: int
    sha256: str
    asked_sha256: str
    data_sha256: str | None
    kept: Kept

    def as_json(self) -> dict:
        """The fields; null where there is no number."""
        numbers = {"value": number_or_none(self.value), "stderr": number_or_none(self.stderr)}
        numbers["kept"] = dataclasses.asdict(self.kept)
        return {**self._asdict(), **numbers}

    @property
    def above_chance(self) -> float | None:
        """Standard errors between the score and chance."""
        return (
            None if self.chance is None or not self.stderr > 0 else (self.value - self.chance) / self.stderr
        )


def plan(names: list[str], shots: str, data: str | None) -> list[tuple[str, int, task_files.TaskFile | None]]:
    """(task, shots, its file or None) of what is asked for, checked before anything is loaded.

    Args:
      names: tasks of experiments/lm_harness/tasks, or with no `data` the harness's own names.
      shots: a number, or `task` for the number that each task file names.
      data: folder of the tasks' data; None reads task and data from the network.

    Raises:
      InputError: a task is not known, has no examples for few-shot prompts, or lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks: needs the package lm_eval; `pip install 'tree_ffn[eval]'` brings it.")
    if shots != "task" and not is_whole_number(shots):
        raise InputError(f"--shots: {shots!r} is not allowed; use 0, 1, 2, ... or task.")
    if data is None:
        if shots == "task":
            raise InputError(
                "--shots: 'task' needs --task_data, whose task files name a number; use a number."
            )
        return [(name, int(shots), None) for name in names]
    if not os.path.isdir(data):
        raise InputError(f"--task_data: {data} is no directory.")
    planned = []
    for task in task_files.choose(names):
        k = task.shots if shots == "task" else int(shots)
        if k and not task.shots:
            raise InputError(f"--shots: {task.name} has no examples for prompts; use 0, or task.")
        planned.append((task.name, k, task))
    return planned


def plan_all(names: list[str], shots: list[str], data: str | None) -> list:
    """`plan` for each of several `shots`; a task that has no examples is asked once.

    Args:
      names: of tasks.
      shots: values of --shots.
      data: folder with the tasks' data; None asks the hub.
    """
    if not shots:
        raise InputError("--shots is empty; use 0, 1, 2, ... or task.")
    return list(dict.fromkeys(one for k in shots for one in plan(names, k, data)))


def answer(
    model: Loaded, planned, *, data: str | None, cache: str, limit: int | None, answerer=None
) -> list[TaskScore]:
    """Runs the planned tasks.

    Args:
      model: what answers, or gives `answerer` its tokenizer and context.
      planned: as `plan` returns it.
      data: folder of the tasks' data, or None.
      cache: folder for data in the harness's form.
      limit: questions of each task; None is all.
      answerer: of experiments/lm_harness/answering.py; the model itself, if it is not named.

    Raises:
      InputError: the limit or a file is not allowed, or the harness cannot load a task.
    """
    if limit is not None:
        check_positive_int("--limit", limit)
    manager = task_manager([task for *_, task in planned], data, cache)
    import lm_eval  # pyright: ignore[reportMissingImports]
    from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
    from jinja2 import TemplateError  # pyright: ignore[reportMissingImports]

    from experiments.lm_harness.harness import HarnessModel

    @contextlib.contextmanager
    def named(name):
        try:
            yield
        except InputError as error:
            raise type(error)(f"{name}: {error}") from None
        except (
            LookupError, ArithmeticError, ValueError, TypeError, AttributeError, OSError, TemplateError,
            AssertionError, DatasetsError,
        ) as error:  # fmt: skip
            why = reason(error.__cause__ or error)  # of data that it cannot read datasets says nothing itself
            raise InputError(f"--tasks: the harness cannot run {name} ({why}).") from error

    lm, loaded, scores = HarnessModel(model, answerer), [], []
    for name, *_ in planned:  # all of them before the first is asked
        with named(name):
            loaded.append(_task(manager, name, lm.context))
    for (name, shots, task), one in zip(planned, loaded):
        lm.kept = Kept()
        with named(name):
            found = lm_eval.simple_evaluate(
                model=lm, tasks=[one], num_fewshot=shots, limit=limit, task_manager=manager,
                bootstrap_iters=0, log_samples=True,  # it would fork this process, threads and all
            )  # fmt: skip
        data_sha256 = None if task is None else task_files.data_sha256(task, cache)
        scores += _scores(found, name, shots, task, data_sha256, lm.kept)
    return scores


def _task(manager, name: str, context: int):
    """A task as the harness's object.

    Raises:
      InputError: it wants answers that cannot be made, or is a group.
    """
    from experiments.lm_harness.task_options import read_options

    tasks = manager.load([name])["tasks"]
    if list(tasks) != [name]:
        raise InputError(f"it is a group of {len(tasks)} tasks; name tasks, such as {next(iter(tasks))}.")
    if tasks[name].get_config("output_type") == "generate_until":
        read_options(tasks[name].get_config("generation_kwargs") or {}, context)
    return tasks[name]


def task_manager(tasks: list, data: str | None, cache: str):
    """What the harness finds tasks with: its own, or those of the files over a folder of data.

    Args:
      tasks: files of tasks, as chosen.
      data: folder with their data; None asks the hub.
      cache: directory that the harness may write to.
    """
    where = {}
    if data is not None:
        where = {"include_path": task_files.prepare(tasks, data, cache), "include_defaults": False}
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read when datasets is imported
            os.environ.setdefault(variable, "1")
        os.environ.setdefault("HF_HOME", os.path.join(os.path.abspath(cache), "datasets"))
    import datasets  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return TaskManager(**where)


def _scores(found: dict, name: str, shots: int, task, data_sha256: str | None, kept: Kept) -> list[TaskScore]:
    samples, figures = found["samples"][name], found["results"][name]
    definition = json.dumps(found["configs"][name], sort_keys=True, default=str)
    sha256 = task.sha256 if task else hashlib.sha256(definition.encode()).hexdigest()[:12]
    asked, kind = _asked(samples), found["configs"][name]["output_type"]
    guess = {"multiple_choice": _guess(samples), "generate_until": 0.0}.get(kind)
    known = (len(samples), sha256, asked, data_sha256, kept)
    scores = []
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        # An accuracy of a choice can be guessed; a likelihood or a greedy match cannot.
        chance = guess if metric in ("acc", "acc_norm") or kind == "generate_until" else None
        error = _stderr(metric, samples)
        scores.append(TaskScore(name, metric, shots, float(value), error, chance, *known))
    return scores


def _asked(samples: list[dict]) -> str:
    """The sha256 of every question's row, prompt and answer."""
    hashes = [sample[f"{part}_hash"] for sample in samples for part in ("doc", "prompt", "target")]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _stderr(metric: str, samples: list[dict]) -> float:
    """Standard error of a mean over questions; of a perplexity, exp(-mean), to first order."""
    values = [sample[metric] for sample in samples]
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return error * math.exp(-statistics.fmean(values)) if metric == "perplexity" else error


def _guess(samples: list[dict]) -> float:
    """Expected accuracy of a random choice."""
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def table(scores: list[TaskScore]) -> str:
    """All scores as text: a line a metric."""
    lines = [f"{'task':<16}{'k':>3}  {'metric':<16}{'score':>10}{'+-':>9}{'chance':>9}{'above':>8}{'n':>8}"]
    for score in scores:
        chance = "" if score.chance is None else f"{score.chance:.4f}"
        above = "" if score.above_chance is None else f"{score.above_chance:.1f} s"
        error = "" if math.isnan(score.stderr) else f"{score.stderr:.4f}"
        value = f"{score.value:.4f}" if math.isfinite(score.value) else "none"
        lines.append(
            f"{score.task:<16}{score.shots:>3}  {score.metric:<16}{value:>10}{error:>9}{chance:>9}"
            f"{above:>8}{score.n:>8,}"
        )
    return "\n".join([*lines, "above: standard errors (s) between the score and chance", *cuts(scores)])


def cuts(scores: list[TaskScore]) -> list[str]:
    """A sentence for every task of whose prompts tokens were cut."""
    of_task = {(score.task, score.shots): score.kept for score in scores if score.kept.cut}
    return [f"{task}, {shots} shots: {kept.said}" for (task, shots), kept in of_task.items()]


def append(path: str, scores: list[TaskScore], facts: dict, row: str, limit: int | None) -> None:
    """Appends rows of table t3_small: every score, its standard error and chance.

    Args:
      path: results file.
      scores: as `answer` returns them.
      facts: config of the rows.
      row: their name.
      limit: questions of each task; None is all.
    """
    from lm_eval import __version__ as version  # pyright: ignore[reportMissingImports]

    rows = []
    for score in scores:
        scored = {
            "task": score.task, "shots": score.shots, "limit": limit, "n": score.n, "lm_eval": version,
            "task_sha256": score.sha256, "asked_sha256": score.asked_sha256, "data_sha256": score.data_sha256,
        }  # fmt: skip
        if score.kept.cut:
            scored["kept"] = dataclasses.asdict(score.kept)
        known = {**facts, "scored": scored}
        stem = f"{score.task}_{score.shots}shot_{score.metric}"
        values = {stem: score.value, f"{stem}_stderr": score.stderr, f"{stem}_chance": score.chance}
        for metric, value in values.items():
            if value is not None and math.isfinite(value):
                names = ("t3_small", row, metric)
                rows.append(record.make_row(*names, value, facts.get("seed"), known, "1"))
    record.append_rows(path, rows)
