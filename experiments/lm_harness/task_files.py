"""Task files for the evaluation harness over local data: what stands in them, and data in the form they name.

A task file is YAML of lm-eval's own form, whose data files are named DATA/<path>. Before the harness reads
them, the files of a folder are written to a cache as plain JSONL, and DATA is put in place:

    DATA/x/valid.jsonl             rows of x/valid.jsonl, plain or packed
    DATA/x/valid.labelled.jsonl    the same, with `label` from the lines of x/valid-labels.lst
    DATA/x/few.solved.jsonl        rows {text} of x/few.jsonl as questions of which nothing is left to answer
    DATA/x/dev.questions.jsonl     x/dev.json in SQuAD's layout, one row a question
    DATA/x/test.whole.jsonl        x/test.txt as one row {text}
"""

import glob
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.lm_harness.task_fields import check_rows, check_templates
from tree_ffn.data.compressed import SUFFIXES
from tree_ffn.data.formats import read_objects, read_text
from tree_ffn.errors import InputError, check_choice, reason
from tree_ffn.json_input import check_characters
from tree_ffn.locks import locked
from tree_ffn.paths import replacing, writing

TASKS = os.path.join(os.path.dirname(__file__), "tasks")
NEEDED = ("task", "dataset_path", "output_type", "doc_to_text", "doc_to_target", "metric_list", "metadata")
# Endings of the files that each form is made of.
FORMS = {
    "": (".jsonl",), "labelled": (".jsonl", "-labels.lst"), "solved": (".jsonl",),
    "questions": (".json",), "whole": (".txt",),
}  # fmt: skip


class TaskFile(NamedTuple):
    """One task.

    Attributes:
      name: `task` of the file.
      path: of the file.
      text: its content.
      shots: `metadata.shots`, the number of examples in few-shot prompts; 0: it has no examples.
      data: the files it names, without DATA/.
    """

    name: str
    path: str
    text: str
    shots: int
    data: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """12 hex digits of what the file says."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def read_task(path: str) -> TaskFile:
    """A task file.

    Raises:
      InputError: names the file, the line and the field that is missing or not allowed.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tasks: {path} cannot be read ({reason(error)}).") from None
    lines = text.splitlines()
    fields = {line.split(":")[0]: number for number, line in enumerate(lines, 1) if re.match(r"\w+:", line)}
    for field in NEEDED:
        if field not in fields:
            raise InputError(
                f"--tasks: {path}, line {len(lines)}: the file ends without the field {field!r}."
            )
    check_templates(path, text)
    shots = re.search(r"^metadata:(?:\n .*)*?\n +shots: *(\d+) *$", text, re.MULTILINE)
    if not shots:
        line = fields["metadata"]
        raise InputError(f"--tasks: {path}, line {line}: metadata lacks `shots`, a whole number of examples.")
    name = re.search(r"^task: *([\w.-]+) *$", text, re.MULTILINE)
    if not name:
        line = fields["task"]
        raise InputError(f"--tasks: {path}, line {line}: task must be a name of letters, digits and _ . -")
    data = tuple(sorted(set(re.findall(r"\bDATA/(\S+)", text))))
    if not data:
        line = fields["dataset_path"]
        raise InputError(f"--tasks: {path}, line {line}: no data_files of the form DATA/<path> are named.")
    return TaskFile(name[1], path, text, int(shots[1]), data)


def choose(names: list[str], folder: str = TASKS) -> list[TaskFile]:
    """The named tasks of a folder of task files; `all` is every one.

    Raises:
      InputError: a name is not known, or a file is not right.
    """
    known = {task.name: task for task in map(read_task, sorted(glob.glob(os.path.join(folder, "*.yaml"))))}
    for name in names:
        check_choice("--tasks", name, [*known, "all"])
    return list(known.values()) if "all" in names else [known[name] for name in dict.fromkeys(names)]


def prepare(tasks: list[TaskFile], data: str, cache: str) -> str:
    """Data and task files in the form that the harness reads.

    Args:
      tasks: what is asked for.
      data: folder of the data.
      cache: folder for what is made of them; what is there and not older is used again.

    Returns:
      a folder of task files.

    Raises:
      InputError: a file of a task is missing or has another form, or the cache cannot be written.
    """
    # All are looked for before any is written.
    sources = {name: _sources(task, name, data) for task in tasks for name in task.data}
    for task in tasks:
        for name in task.data:
            _check_fields(task, name, sources[name])
    cache = os.path.abspath(cache)
    for name, paths in sources.items():
        made = os.path.join(cache, name)
        if not (os.path.isfile(made) and os.path.getmtime(made) >= max(map(os.path.getmtime, paths))):
            _write(made, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(name, paths)))
    folder = os.path.join(cache, "tasks")
    for task in tasks:
        _write(os.path.join(folder, os.path.basename(task.path)), task.text.replace("DATA/", cache + "/"))
        for module in glob.glob(os.path.join(os.path.dirname(task.path), "*.py")):
            _write(os.path.join(folder, os.path.basename(module)), pathlib.Path(module).read_text("utf-8"))
    return folder


def data_sha256(task: TaskFile, cache: str) -> str:
    """The sha256 of a task's data in the form that the harness reads, however they were packed.

    Args:
      task: one that `prepare` has been given.
      cache: the same as there.
    """
    digest = hashlib.sha256()
    for name in task.data:
        digest.update(pathlib.Path(cache, name).read_bytes())
    return digest.hexdigest()


def _write(path: str, text: str) -> None:
    with writing(path, "--task_cache"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(f"{path}.lock", waits=bool), replacing(path, field="--task_cache") as file:
        file.write(text)


def _form(name: str) -> tuple[str, str]:
    """Path without its ending, and form, of DATA/`name`: ('x/dev', 'questions') of x/dev.questions.jsonl."""
    stem, form = os.path.splitext(name.removesuffix(".jsonl"))
    return (stem, form[1:]) if form[1:] in FORMS else (stem + form, "")


def _sources(task: TaskFile, name: str, data: str) -> list[str]:
    if not name.endswith(".jsonl"):
        raise InputError(f"--tasks: {task.path}: DATA/{name} is not allowed; use names that end in .jsonl.")
    found = []
    stem, form = _form(name)
    for ending in FORMS[form]:
        paths = [os.path.join(data, stem + ending + suffix) for suffix in ("", *SUFFIXES)]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            raise InputError(f"--task_data: {paths[0]} (plain or packed) is missing; {task.name} needs it.")
        found.append(path)
    return found


def _objects(path: str) -> Iterator[tuple[str, dict]]:
    for place, row in read_objects(pathlib.Path(path), f"--task_data: {path}"):
        check_characters(json.dumps(row, ensure_ascii=False), place)
        yield place, row


def _check_fields(task: TaskFile, name: str, paths: list[str]) -> None:
    """Rows that are made here have what they have; those of a file have to have what the task needs."""
    _, form = _form(name)
    added = {"label": 0} if form == "labelled" else {}
    if form in ("", "labelled"):
        check_rows(((place, {**row, **added}) for place, row in _objects(paths[0])), task.name, task.text)


def _rows(name: str, paths: list[str]) -> list[dict]:
    """The rows of DATA/`name`."""
    _, form = _form(name)
    if form == "questions":
        return _squad_questions(paths[0])
    if form == "whole":
        return [{"text": read_text(pathlib.Path(paths[0]), f"--task_data: {paths[0]}")}]
    rows = [row for _, row in _objects(paths[0])]
    if form == "labelled":
        labels = read_text(pathlib.Path(paths[1]), f"--task_data: {paths[1]}").split()
        if len(labels) != len(rows):
            raise InputError(f"--task_data: {paths[1]} has {len(labels)} labels for {len(rows)} rows.")
        if odd := [label for label in labels if not re.fullmatch("-?[0-9]{1,9}", label)]:
            raise InputError(
                f"--task_data: {paths[1]} has the label {odd[0][:20]!r}, which is no whole number."
            )
        return [{**row, "label": int(label)} for row, label in zip(rows, labels)]
    if form == "solved":
        return [{"id": -1, "query": row["text"], "choices": [""] * 4, "gold": 0} for row in rows]
    return rows


def _squad_questions(path: str) -> list[dict]:
    whole = next((row for _, row in _objects(path)), {})
    try:
        return [
            {
                "title": article["title"], "context": paragraph["context"], "question": question["question"],
                "answers": [answer["text"] for answer in question["answers"]], "id": question["id"],
            }
            for article in whole["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"--task_data: {path} is not in SQuAD's layout ({reason(error)}).") from None
