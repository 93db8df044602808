"""Fine-tuning as a function of a config (configs/finetune.py): what experiments/finetune runs."""

import dataclasses
import functools
import json
import math
import os

import jax
import jax.numpy as jnp

from experiments.common import provenance, run_config, starts
from experiments.common.config_words import check_config
from experiments.reporting import record, texts
from tree_ffn.data import PreparedCorpus, corpus_spec_from_config, load_tokenizer, valid_batches
from tree_ffn.data.qa_rows import prepare_questions
from tree_ffn.errors import InputError, is_whole_number
from tree_ffn.models.spec import spec_to_dict
from tree_ffn.plain import namespace
from tree_ffn.training import workdir as workdirs
from tree_ffn.training.checkpoint_files import checkpoint_directory, steps_on_disk
from tree_ffn.training.compiled import Scorer
from tree_ffn.training.finetune import FinetuneSpec, check_teacher, compile_finetuning, score_step
from tree_ffn.training.loop import train
from tree_ffn.training.metrics import loss_metrics
from tree_ffn.training.plan import TrainSpec, check_trainable, prepare_data, resolved, settled, train_spec
from tree_ffn.training.restore import Restored
from tree_ffn.training.workdir import begin_run

# Of a config's `data`: what text it is.
TEXT_FIELDS = ("corpus", "files", "valid_files", "text_field", "tfds_dir", "tfds_name", "valid_share")
# Of the dense perplexity.
NEAR = 1.02


def finetune(
    config, workdir: str, *, other: dict[str, str] | None = None, results: str | None = None,
    table: str = "conversion", row: str = "", command: str | None = None,
) -> tuple[dict, dict]:  # fmt: skip
    """Trains `finetune.start` further, or goes on with the run that `workdir` holds.

    Args:
      config: of configs/finetune.py.
      workdir: of the run; before.json in it has the figures of the start and of the teacher.
      other: texts to score at the end, as `texts.parse` returns them.
      results, table, row: file to append the figures to, and names of the rows; None appends nothing.
      command: of the rows; by default this process's own.

    Returns:
      {"before": figures of the start, "teacher": ... where there is one}, and the figures at the end.

    Raises:
      InputError: the config cannot be used.
    """
    spec = finetune_spec(config)
    start = load_start(config.finetune.start, config.finetune.step)
    config = on_text_of(start, config)
    check_config(config)
    teacher = load_teacher(config, start, spec)
    prepare = functools.partial(prepare_rows, spec=spec)
    data = prepare(config, start.model)
    say_text(config, start, data)
    taught = (teacher.model, teacher.variables) if teacher else (None, None)
    if not steps_on_disk(checkpoint_directory(workdir)):
        begin(workdir, config, start, teacher, data)
    figures = train(
        config, workdir, origin=functools.partial(provenance.origin, command), prepare=prepare,
        compile=lambda plan: compile_finetuning(plan, spec, *taught),
    )  # fmt: skip
    before = workdirs.read_json(workdir, "before.json") or {}
    if teacher:
        figures |= until_near(
            workdir, before["teacher"]["loss"], config.train.batch_size * start.model.max_seq_len
        )
    names = {"results": results, "table": table, "row": row, "command": command}
    if other:
        texts.score_at_end(workdir, config, other, **names)
    if results:  # last: a run whose validation loss is recorded counts as done for a sweep
        losses = {f"loss_{name}": found["loss"] for name, found in before.items()}
        record.append_figures(
            results, {**figures, **losses}, table=table, row=row, command=command,
            config=run_config.finetuned_config(config, start), data_meta=data.meta,
        )  # fmt: skip
    return before, figures


def until_near(workdir: str, dense_loss: float, tokens_per_step: int) -> dict[str, int]:
    """{"tokens_until_near": tokens trained on at the first validation within 2 % of the dense perplexity}.

    Empty where there was none; {"tokens": all that were trained on} is always there.

    Args:
      workdir: of the fine-tuning.
      dense_loss: validation loss of the dense model.
      tokens_per_step: of a training step.
    """
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if line["split"] == "valid"]
    near = [line["step"] for line in lines if line["loss"] <= dense_loss + math.log(NEAR)]
    found = {"tokens": lines[-1]["step"] * tokens_per_step}
    return found | ({"tokens_until_near": near[0] * tokens_per_step} if near else {})


def finetune_spec(config) -> FinetuneSpec:
    """The checked `config.finetune`."""
    if "finetune" not in resolved(config):
        raise InputError("--config: it has no section finetune; use configs/finetune.py.")
    values = config.finetune
    names = ("task", "weights", "ce", "kl", "ffn", "gradual", "gradual_steps")
    spec = FinetuneSpec(**{name: values[name] for name in names})
    if not values.start:
        raise InputError("finetune.start: '' is not allowed; name the directory of a run or of an export.")
    if spec.teacher and not values.teacher:
        raise InputError(
            "finetune.teacher: '' is not allowed where kl, ffn or gradual is asked for; "
            "name the directory of the dense model."
        )
    if spec.gradual_steps > config.train.steps:
        raise InputError(
            f"finetune.gradual_steps: {spec.gradual_steps} is not allowed; use at most train.steps = "
            f"{config.train.steps}, so that no dense layer is left at the end."
        )
    return spec


def load_start(place: str, step: str) -> Restored:
    """The model that `finetune.start` and `finetune.step` name, which can be trained."""
    number = int(step) if is_whole_number(step) else step
    start = trainable(starts.load(place, number, field="finetune.start"))
    check_trainable(start.model)
    return start


def trainable(start: Restored) -> Restored:
    """The start with dense starts over, and weights that can be trained: imported ones may have 16 bits."""
    model = dataclasses.replace(start.model.after_start, param_dtype="float32")
    if model == start.model:
        return start
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start.variables["params"])
    return start._replace(
        model=model,
        variables={**start.variables, "params": weights},
        meta={**start.meta, "model": spec_to_dict(model)},
    )


def on_text_of(start: Restored, config):
    """The config with the start's text, tokenizer and cache where it does not name others.

    Args:
      start: of `load_start`.
      config: where `data.corpus` is `start`, no text is named; empty fields are not either.

    Raises:
      InputError: the start names no text, or none of this task.
    """
    config, theirs = settled(config), start.config.data
    if config.data.corpus == "start" and any(
        config.data[name] for name in ("files", "tfds_dir", "tfds_name")
    ):
        config.data.corpus = "named"
    if config.data.corpus == "start":
        corpus, questions = start.meta["data"].get("corpus"), config.finetune.task == "qa"
        if corpus is None or questions != (corpus == "questions"):
            what = "questions" if questions else "text"
            raise InputError(
                f"data.files: '' is not allowed; finetune.start = {config.finetune.start!r} says no {what} "
                "to train on: name files of it."
            )
        for name in TEXT_FIELDS:
            setattr(config.data, name, theirs[name])
    for name in ("tokenizer", "cache_dir"):
        setattr(config.data, name, getattr(config.data, name) or theirs[name])
    return config


def say_text(config, start: Restored, data: PreparedCorpus) -> None:
    """Prints what text is trained on, and whether the start was.

    Args:
      config: of the fine-tuning.
      start: the model that it begins with.
      data: the text.
    """
    then, now = start.meta["data"].get("sha256"), data.meta["sha256"]
    named = config.data.files or config.data.tfds_name or config.data.tfds_dir or config.data.corpus
    known = {None: "", now: ", the text of finetune.start"}.get(
        then, ", another text than that of finetune.start"
    )
    print(f"trains on {named}{known}", flush=True)


def load_teacher(config, start: Restored, spec: FinetuneSpec) -> Restored | None:
    """The model that `finetune.teacher` names; it and the start have the config's tokenizer.

    Args:
      config: of the fine-tuning.
      start: the model that it begins with.
      spec: of the fine-tuning, checked.
    """
    values = config.finetune
    teacher = starts.load(values.teacher, field="finetune.teacher") if values.teacher else None
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint
    for name, run in (("start", start), ("teacher", teacher)):
        if run and run.meta["data"]["tokenizer_sha256"] != fingerprint:
            raise InputError(
                f"data.tokenizer: {config.data.tokenizer!r} is not that of finetune.{name}; "
                f"use {run.config.data.tokenizer!r} or where it is now."
            )
    if teacher:
        check_teacher(start.model, teacher.model, spec)
    return teacher


def prepare_rows(config, model, log=print, *, spec: FinetuneSpec) -> PreparedCorpus:
    """The rows of `config.data`: of text, or of questions.

    Args:
      config: whose `data` is read.
      model: whose context is the length of a row.
      log: is given each line of progress.
      spec: of the fine-tuning, which says text or questions.
    """
    if spec.task == "lm":
        return prepare_data(config, model, log)
    fields = config.finetune.prompt_field, config.finetune.answer_field
    return prepare_questions(corpus_spec_from_config(config), model.max_seq_len + 1, *fields)


def begin(workdir: str, config, start: Restored, teacher: Restored | None, data: PreparedCorpus) -> None:
    """Scores start and teacher as validations will score, and writes the run's step 0.

    Args:
      workdir: of the fine-tuning.
      config: of the fine-tuning.
      start: the model that it begins with.
      teacher: the model that it imitates, if any.
      data: the text.
    """
    before = {"before": score(start, data, train_spec(config))}
    if teacher:
        before["teacher"] = score(teacher, data, train_spec(config))
    values = resolved(config)
    meta = {"config": values, "data": data.meta}
    workdirs.write_json(workdir, "before.json", before)  # first: a run that has a checkpoint has begun
    begin_run(
        workdir, start._replace(config=namespace(values), meta=meta), start.model, start.variables,
        before["before"]["loss"], converted=start.meta.get("converted"),
    )  # fmt: skip
    said = ", ".join(f"{name} {figures['loss']:.4f}" for name, figures in before.items())
    print(f"validation loss: {said}", flush=True)


def score(run: Restored, data: PreparedCorpus, spec: TrainSpec) -> dict[str, float]:
    """Loss and its other units on the validation batches of training.

    Args:
      run: the model.
      data: its validation rows are read.
      spec: says how many, and in batches of what size.
    """
    with jax.set_mesh(run.mesh):
        scorer = Scorer(run.model, run.mesh, score_step)
        found = scorer(run.variables, valid_batches(data.valid, spec.batch_size, spec.eval_batches))
    return loss_metrics(found.loss, data.meta["bytes_per_token"])


def table(before: dict, figures: dict) -> str:
    """Teacher, before and after: one line each."""
    lines = {name: before[name] for name in ("teacher", "before") if name in before} | {"after": figures}
    rows = [f"{name:<10}{found['loss']:>10.4f}{found['ppl']:>12.3f}" for name, found in lines.items()]
    return "\n".join([f"{'':<10}{'loss':>10}{'perplexity':>12}", *rows])
