"""Scores a checkpoint on the text it was validated on, or on any other.

    python -m experiments.evaluate --workdir=runs/tree
    python -m experiments.evaluate --workdir=runs/tree --step=latest --files='novels/*.txt.xz'
    python -m experiments.evaluate --workdir=runs/tree --results=results/cpu_small.jsonl --row=dense
    python -m experiments.evaluate --workdir=runs/tree --texts=wikitext2=wikitext2/test.raw.txt.xz
    python -m experiments.evaluate --export=exported/opt --tasks=hellaswag,piqa --task_data=DATA
    python -m experiments.evaluate --workdir=runs/tree --tasks=all --shots=task --task_data=DATA --limit=200

--texts scores every token of other texts once, and says nats a word and perplexity a word too (words between
white space and ends of line, as is usual for WikiText).

--tasks asks questions by EleutherAI's harness (the extra `eval`): the files of experiments/lm_harness/tasks
over a folder of data, or without --task_data the harness's own tasks, which it fetches from the network.
--shots=task puts as many solved examples before a question as the task file says. Every score comes with its
standard error and with what chance gives; prompts that the context cuts on the left are counted.

--watch=60 goes on beside a run: it looks for checkpoints every 60 seconds and scores the newest,
until it is that of the last step.

Prints loss (nats a token), perplexity, bits per byte, active share, and the use
of every layer's leaves or experts; --json writes the same.
"""

from absl import flags

from experiments.common import cli, loaded, path_flags, run_config, text_flags, watch
from experiments.lm_harness import questions
from experiments.reporting import record, texts
from tree_ffn.data.packing import TooShort
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.json_output import json_text
from tree_ffn.training.evaluate import evaluate, other_corpus
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.training.sharding import make_mesh

_WORKDIR = path_flags.define_place("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_CORPUS, _FILES, _TFDS_DIR, _TFDS_NAME, _TEXT_FIELD, _TOKENIZER, _CACHE_DIR = text_flags.define(use="score")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "valid", "all"],
    "Which rows; with --files all, else valid.",
)
_BATCHES = flags.DEFINE_integer("batches", 0, "Batches to score; 0 is all.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows a batch.")
_TEXTS = flags.DEFINE_list("texts", [], texts.HELP)
_EXPORT = path_flags.define("export", None, "With --tasks, instead of a run: an exported model's directory.")
_TASKS = flags.DEFINE_list(
    "tasks", [], "Tasks of the evaluation harness; all: every one of experiments/lm_harness/tasks."
)
_TASK_DATA = path_flags.define("task_data", None, "Folder with the data of the tasks.")
_SHOTS = flags.DEFINE_list("shots", ["0"], "Solved examples before a question: a number, task, or several.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of a task; all by default.")
_TASK_CACHE = path_flags.define("task_cache", "data_cache/tasks", "Where task data are kept unpacked.")
_WATCH = flags.DEFINE_integer(
    "watch", 0, "Score the newest checkpoint as they come, looking every so many seconds; 0: score one."
)
_JSON = path_flags.define_written("json", None, "Write the metrics to this file.")
_RESULTS = path_flags.define_written("results", None, "Append the metrics to this results file (JSONL).")
_TABLE = flags.DEFINE_string("table", "cpu_small", "Table of the results rows: ours, or a name of your own.")
_ROW = flags.DEFINE_string("row", None, "Name of the results row.")


def main() -> None:
    record.check_row_flag(_RESULTS.value, _ROW.value, _TABLE.value)
    check_positive_int("--watch", _WATCH.value, least=0)
    for flag in (_RESULTS, _TASKS, _STEP):
        if _WATCH.value and flag.value != flag.default:
            raise InputError(f"--{flag.name}: {flag.value!r} is not allowed with --watch; leave it out.")
    if _TASKS.value:
        answer_questions()
        return
    if _EXPORT.value:
        raise InputError("--export: is scored by --tasks alone; name tasks, or a run by --workdir.")
    if _WORKDIR.value is None:
        raise InputError("--workdir is missing; name the directory of a training run.")
    if not _WATCH.value:
        score(_STEP.value)
        return
    for step in watch.newest_steps(_WORKDIR.value, _WATCH.value):
        score(str(step))


def score(step: str) -> None:
    """Scores a checkpoint, on what the flags say."""
    other = texts.parse(_TEXTS.value)
    run = restore_for_inference(_WORKDIR.value, step, make_mesh(data=-1, model=1))
    if other:
        found = texts.score(
            run, other, batch_size=_BATCH_SIZE.value, tokenizer=_TOKENIZER.value,
            text_field=_TEXT_FIELD.value or "text",
            results=_RESULTS.value, table=_TABLE.value, row=_ROW.value,
        )  # fmt: skip
        if _JSON.value:
            write_json(_JSON.value, found)
        return
    flags_of_data = (_CORPUS, _FILES, _TFDS_DIR, _TFDS_NAME, _TEXT_FIELD, _TOKENIZER, _CACHE_DIR)
    try:
        corpus = other_corpus(run, **{flag.name: flag.value for flag in flags_of_data})
    except TooShort as error:
        raise InputError(f"{error} --texts=NAME=FILES scores a short text whole.") from error
    if _FILES.value:
        texts.say_if_trained_on(run, _FILES.value, "--files")
    split = _SPLIT.value or ("all" if _FILES.value else "valid")
    figures = evaluate(run, corpus, split, _BATCH_SIZE.value, _BATCHES.value)
    print(table(figures, f"{corpus.meta['corpus']} ({split}), step {figures['step']} of {_WORKDIR.value}"))
    if corpus.lost:
        print(corpus.lost)
    if _JSON.value:
        write_json(_JSON.value, figures)
    if _RESULTS.value:
        names = {"table": _TABLE.value, "row": _ROW.value}
        config = run_config.config_of(run)
        record.append_figures(_RESULTS.value, figures, config=config, data_meta=corpus.meta, **names)


def answer_questions() -> None:
    """What --tasks asks for."""
    planned = questions.plan_all(_TASKS.value, _SHOTS.value, _TASK_DATA.value)
    model = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value, _STEP.value)
    scores = questions.answer(
        model, planned, data=_TASK_DATA.value, cache=_TASK_CACHE.value, limit=_LIMIT.value
    )
    print(questions.table(scores))
    if _JSON.value:
        write_json(_JSON.value, {"scores": [score.as_json() for score in scores]})
    if _RESULTS.value:
        questions.append(_RESULTS.value, scores, model.facts, _ROW.value, _LIMIT.value)


def table(figures: dict, title: str) -> str:
    """The figures as text: one line each, and one line a layer."""
    names = {"loss": "nats a token", "ppl": "", "bits_per_byte": "bits", "active_share": "of all units"}
    lines = [title] + [f"  {name:<14}{figures[name]:>10.4f} {unit}" for name, unit in names.items()]
    lines.append(f"  {'tokens':<14}{figures['tokens']:>10,}")
    by_layer: dict[int, dict] = {}
    for name, value in figures.items():
        metric, _, layer = name.partition("/")
        if layer:
            by_layer.setdefault(int(layer), {})[metric] = value
    for layer, values in by_layer.items():
        said = ", ".join(f"{metric.replace('_', ' ')} {value:.3f}" for metric, value in values.items())
        lines.append(f"  layer {layer:<8}{said}")
    return "\n".join(lines)


def write_json(path: str, figures: dict) -> None:
    """Writes figures as one JSON object.

    Raises:
      InputError: the file cannot be written.
    """
    text = json_text(figures, path, indent=2)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise InputError(f"--json: {path} cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    cli.run(main, prints=lambda: not (_RESULTS.value or _JSON.value))
