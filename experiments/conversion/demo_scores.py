"""Scores of the models of a demonstration: on other texts, and on questions."""

import dataclasses
from typing import Any

from experiments.common import loaded, run_config, starts
from experiments.lm_harness import questions
from experiments.reporting import record, texts
from tree_ffn.training import workdir as workdirs

SHOTS = ["0", "task"]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What models are scored on.

    Attributes:
      texts: {name: glob pattern}.
      tasks: of the evaluation harness; none where it is not installed.
      task_data, task_cache: folders of their data.
      limit: questions of a task; None is all.
    """

    texts: dict[str, str]
    tasks: list[str]
    task_data: str | None
    task_cache: str
    limit: int | None

    def asked_for(self) -> dict[str, Any]:
        """What is scored, as JSON values."""
        return {"texts": sorted(self.texts), "tasks": self.tasks, "limit": self.limit}

    def done(self, workdir: str) -> bool:
        """Whether the model of a run was scored on all of it."""
        return workdirs.read_json(workdir, "scored.json") == self.asked_for()


def score(scoring: Scoring, workdir: str, row: str, results: str | None, config=None) -> None:
    """Scores a model, once.

    Args:
      scoring: on what.
      workdir: of the run.
      row: name of the rows.
      results: file of the rows; None writes none.
      config: what the rows say of it; by default `run_config.config_of`.
    """
    if scoring.done(workdir):
        return
    run = starts.load(workdir, "latest")
    if scoring.texts:
        print(f"\n{row}:", flush=True)
        texts.score(run, scoring.texts, results=results, table="conversion", row=row, config=config)
    facts = record.public_config(config or run_config.config_of(run), run.meta["data"])
    if scoring.tasks:
        ask(scoring, workdir, row, results, facts)
    workdirs.write_json(workdir, "scored.json", scoring.asked_for())


def ask(scoring: Scoring, workdir: str, row: str, results: str | None, facts: dict) -> None:
    """The harness asks, without solved examples and with them."""
    model = loaded.load(workdir, None, step="latest")
    planned = questions.plan_all(scoring.tasks, SHOTS, scoring.task_data)
    scores = questions.answer(
        model, planned, data=scoring.task_data, cache=scoring.task_cache, limit=scoring.limit
    )
    print(f"\n{row}\n{questions.table(scores)}", flush=True)
    if results:
        questions.append(results, scores, facts, row, scoring.limit)
