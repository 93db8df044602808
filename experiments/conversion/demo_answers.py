"""Answers of several models to the same questions, in one small file.

    {asked: head of the file of questions, questions_sha256}
    {row, facts, device, answers: those of a model, in the order of the questions}, a line each

Of an answer in nats five decimals are kept. Questions are not repeated: who reads needs their file.
"""

import hashlib
import lzma
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.lm_eval import answering
from tree_ffn.data.compressed import read_bytes
from tree_ffn.errors import InputError
from tree_ffn.json_input import parse_object
from tree_ffn.json_output import json_text
from tree_ffn.training.disk import replacing

FILE = "answers.json.xz"  # of one model, in its workdir


class ModelAnswers(NamedTuple):
    """Answers of one model: the name of its rows, where it ran, and who answers."""

    row: str
    device: str
    answers: answering.Answers


def write_one(
    workdir: str, row: str, facts: dict, device: str, questions: Sequence[dict], answers: Sequence[dict]
) -> None:
    """Writes the answers of a model into its workdir.

    Args:
      workdir: of its run.
      row, facts, device: name, config and device of its results rows.
      questions: as they are written.
      answers: of `answer_all`.
    """
    known = {one["key"]: one["answer"] for one in answers}
    in_order = [_short(known[answering.key_of(question)]) for question in questions]
    line = {"row": row, "facts": facts, "device": device, "answers": in_order}
    with replacing(os.path.join(workdir, FILE), "wb") as file:
        file.write(lzma.compress(json_text(line, FILE).encode()))


def _short(answer):
    return answer if isinstance(answer, str) else [round(answer[0], 5), int(answer[1])]


def gather(path: str, asked: str, workdirs: Iterable[str]) -> int:
    """Writes the answers of all models that have answered into one file; returns how many they are.

    Args:
      path: the file; .xz packs it.
      asked: file of the questions.
      workdirs: of the models.
    """
    head, questions = answering.read_asked(asked)
    lines = []
    for workdir in workdirs:
        written = Path(workdir, FILE)
        if written.exists():
            lines.append(parse_object(read_bytes(written), str(written)))
    first = {"asked": head, "questions_sha256": digest(questions)}
    answering.write_lines(path, first, lines, "answers")
    return len(lines)


def read(path: str, asked: str) -> list[ModelAnswers]:
    """The answers of every model of a file that `gather` wrote.

    Raises:
      InputError: a file is none, or the questions are not those that were answered.
    """
    head, questions = answering.read_asked(asked)
    has_digest = lambda first: isinstance(first.get("questions_sha256"), str)
    first, models = answering.read_lines(path, "answers", has_digest, _is_of_a_model)
    if first["questions_sha256"] != digest(questions):
        raise InputError(f"--asked: {asked} has not the questions that {path} answers; name their file.")
    keys = [answering.key_of(question) for question in questions]
    return [
        ModelAnswers(
            model["row"], model["device"],
            answering.Answers(path, model["facts"], head, dict(zip(keys, model["answers"]))),
        )
        for model in models
    ]  # fmt: skip


def _is_of_a_model(line: dict) -> bool:
    named = isinstance(line.get("row"), str) and isinstance(line.get("device"), str)
    answers = line.get("answers")
    listed = isinstance(answers, list) and all(map(answering.is_answer, answers))
    return named and listed and isinstance(line.get("facts"), dict)


def digest(questions: Sequence[dict]) -> str:
    """12 hex digits of the questions in their order."""
    keys = "".join(map(answering.key_of, questions))
    return hashlib.sha256(keys.encode()).hexdigest()[:12]
