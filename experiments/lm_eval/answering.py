"""What the evaluation harness asks of a model, answered here or on another machine.

A harness asks two things: how likely a continuation is (`likelihoods`), and how a
prompt goes on (`texts`). `Answering` does both with a model. `Asked` and `Answers`
are the same two, to a file and from one: where the harness is not installed (an
accelerator without a network), experiments/answer.py answers a file of questions.
"""

import dataclasses
import functools
import hashlib
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from experiments.common.loaded import Loaded
from experiments.lm_eval.continued import continued
from tree_ffn.data.compressed import read_chunks
from tree_ffn.data.formats import decoded
from tree_ffn.data.json_stream import json_values
from tree_ffn.errors import InputError
from tree_ffn.inference import decode, scoring
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.sampling import Sampling
from tree_ffn.json_output import json_text

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of a continuation
BATCH_TOKENS = 8192


class Answerer(Protocol):
    """Who answers.

    `likelihoods` gives (log-likelihood in nats, whether it is the greedy one) of every pair, and `texts` how
    every request goes on until one of its stop strings.
    """

    def likelihoods(self, pairs: Sequence[Pair], quiet: bool) -> list[tuple[float, bool]]: ...

    def texts(self, asked: Sequence[Request], stops: Sequence[list[str]], quiet: bool) -> list[str]: ...


class Answering:
    """A model answers.

    Args:
      model: as `loaded.load` returns it.
      batch_tokens: about how many tokens run at once.
    """

    def __init__(self, model: Loaded, batch_tokens: int = BATCH_TOKENS):
        self._model, self._batch_tokens = model, batch_tokens
        self._decoding: tuple | None = None

    def likelihoods(self, pairs, quiet=False):
        with _bar(len(pairs), "likelihoods", quiet) as bar:
            found = scoring.score(
                self._model.spec, self._model.variables, pairs, self._batch_tokens, bar.update
            )
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def texts(self, asked, stops, quiet=False):
        if self._decoding is None:
            self._decoding = decode.for_decoding(self._model.spec, self._model.variables)
        # Prompts of about one length are read together.
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
        longest = max((len(one.prompt) + one.n_tokens for one in asked), default=1)
        batch = Batch(*self._decoding, rows=max(1, self._batch_tokens // longest))
        answers = [""] * len(asked)
        in_order = [asked[i] for i in order], self._model.tokenizer, [stops[i] for i in order]
        with _bar(len(asked), "answers", quiet) as bar:
            for place, text, last in continued(batch, *in_order):
                answers[order[place]] += text
                bar.update(int(last))
        return answers


class Asked:
    """Notes what is asked and answers nothing of worth: 0 nats, no text.

    Attributes:
      questions: {key: question}, each once.
    """

    def __init__(self):
        self.questions: dict[str, dict] = {}

    def likelihoods(self, pairs, quiet=False):
        del quiet
        self._note(map(of_pair, pairs))
        return [(0.0, False)] * len(pairs)

    def texts(self, asked, stops, quiet=False):
        del quiet
        self._note(map(of_prompt, asked, stops))
        return [""] * len(asked)

    def _note(self, questions):
        self.questions |= {key_of(question): question for question in questions}


class Answers:
    """Answers from a file.

    Args:
      path: of the file, for messages.
      facts: what a results row says of the model that answered.
      asked: the head of the file of questions (`head_of`).
      known: {key of a question: answer}.
      device: that answered, if the file says so.

    Raises:
      InputError: (in use) there is no answer to something.
    """

    def __init__(self, path: str, facts: dict, asked: dict, known: dict, device: str | None = None):
        self._path, self.facts, self.asked, self._known, self.device = path, facts, asked, known, device

    @classmethod
    def read(cls, path: str) -> "Answers":
        """What experiments/answer.py wrote.

        Raises:
          InputError: it is no such file.
        """
        head, rows = read_lines(path, "answers", _is_head_of_answers, _has_answer)
        known = {row["key"]: row["answer"] for row in rows}
        return cls(path, head["facts"], head["asked"], known, head.get("device"))

    def likelihoods(self, pairs, quiet=False):
        del quiet
        return [(float(nats), bool(greedy)) for nats, greedy in map(self._answer, map(of_pair, pairs))]

    def texts(self, asked, stops, quiet=False):
        del quiet
        return [self._answer(question) for question in map(of_prompt, asked, stops)]

    def _answer(self, question):
        try:
            return self._known[key_of(question)]
        except KeyError:
            raise InputError(
                f"--answers: {self._path} has no answer to a question of this task; answer what --ask wrote "
                "for the same tasks, shots, limit and tokenizer."
            ) from None


def head_of(model: Loaded) -> dict:
    """What questions say of the model that they were asked for: in its tokens, for its context."""
    return {
        "context": model.spec.max_seq_len, "begins_with": model.begins_with,
        "tokenizer_sha256": model.tokenizer.fingerprint,
    }  # fmt: skip


def check_fits(head: dict, model: Loaded) -> None:
    """Raises InputError unless questions were asked in the model's tokens and for its context."""
    for name, value in head_of(model).items():
        if head.get(name) != value:
            raise InputError(
                f"--asked: {name} of the questions is {head.get(name)!r}, the model's {value!r}; ask again "
                "with the model's tokenizer, context and beginning."
            )


def of_pair(pair: Pair) -> dict:
    """A question as it is written: how likely is that continuation?"""
    context, continuation = pair
    return {"context": list(map(int, context)), "continuation": list(map(int, continuation))}


def of_prompt(asked: Request, stops: list[str]) -> dict:
    """A question as it is written: how does that prompt go on?"""
    sampling = dataclasses.asdict(asked.sampling)
    prompt = list(map(int, asked.prompt))
    question = {"prompt": prompt, "n_tokens": asked.n_tokens, "stops": stops, "sampling": sampling}
    return question | ({"seed": asked.seed} if asked.seed else {})  # files without are older


def key_of(question: dict) -> str:
    """16 digits of a question's sha256."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def request_of(question: dict) -> Request:
    """What is asked by a question that `of_prompt` wrote."""
    sampling = Sampling(**question["sampling"])
    return Request(tuple(question["prompt"]), question["n_tokens"], sampling, question.get("seed", 0))


def answer_all(answerer: Answerer, questions: Sequence[dict]) -> list[dict]:
    """[{key, answer}] of questions as they are written; those of a kind are answered together."""
    pairs = [question for question in questions if "continuation" in question]
    prompts = [question for question in questions if "continuation" not in question]
    requests = list(map(request_of, prompts))
    likelihoods = answerer.likelihoods([(one["context"], one["continuation"]) for one in pairs], False)
    texts = answerer.texts(requests, [one["stops"] for one in prompts], False) if prompts else []
    answers = [*map(list, likelihoods), *texts]
    return [{"key": key_of(question), "answer": answer} for question, answer in zip(pairs + prompts, answers)]


def write_lines(path: str, head: dict, rows: Sequence[dict], flag: str) -> None:
    """Writes a head and rows, JSON a line; packed if the name ends in .xz.

    Raises:
      InputError: the file cannot be written.
    """
    # Few-shot examples come back after more text than the window of the usual preset holds.
    packed: Callable = functools.partial(lzma.open, preset=9 | lzma.PRESET_EXTREME)
    opener = packed if path.lower().endswith(".xz") else open
    lines = [json_text(line, path) + "\n" for line in (head, *rows)]  # all of them, before a file is opened
    try:
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise InputError(f"--{flag}: {path} cannot be written ({error.strerror}).") from error


def read_lines(
    path: str, flag: str, is_head: Callable[[dict], bool], is_row: Callable[[dict], bool]
) -> tuple[dict, list[dict]]:
    """What `write_lines` wrote: the head, and the rows.

    Raises:
      InputError: the file cannot be read, or a line of it is not what its place asks for; names the line.
    """
    where, found = f"--{flag}: {path}", []
    for line, value in json_values(decoded(read_chunks(Path(path)), Path(path)), where):
        if not (isinstance(value, dict) and (is_row if found else is_head)(value)):
            raise _not_written(f"{where}, line {line}")
        found.append(value)
    if not found:
        raise _not_written(where)
    return found[0], found[1:]


def _not_written(where: str) -> InputError:
    return InputError(f"{where} is not what experiments.evaluate --ask or experiments.answer writes.")


def read_asked(path: str) -> tuple[dict, list[dict]]:
    """Head and questions of what `experiments.evaluate --ask` wrote; errors as of `read_lines`."""
    return read_lines(path, "asked", is_head, _is_question)


def is_head(value) -> bool:
    """Whether a JSON value says of a model what `head_of` does."""
    return (
        isinstance(value, dict) and type(value.get("context")) is int
        and isinstance(value.get("tokenizer_sha256"), str) and _are_ids(value.get("begins_with"))
    )  # fmt: skip


def _is_question(row: dict) -> bool:
    if "continuation" in row:
        return all(row.get(part) and _are_ids(row[part]) for part in ("context", "continuation"))
    stops = row.get("stops")
    if not (
        row.get("prompt")
        and _are_ids(row["prompt"])
        and isinstance(stops, list)
        and all(map(_is_stop, stops))
    ):
        return False
    try:
        request_of(row)
    except (TypeError, KeyError):  # a field is missing, is no number, or nobody knows it
        return False
    return type(row["n_tokens"]) is int and type(row.get("seed", 0)) is int


def is_answer(value) -> bool:
    """Whether a JSON value is a text, or a log-likelihood and whether it is the greedy one."""
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(one, (int, float)) for one in value)
    return pair or isinstance(value, str)


def _has_answer(row: dict) -> bool:
    return isinstance(row.get("key"), str) and is_answer(row.get("answer"))


def _is_head_of_answers(head: dict) -> bool:
    return isinstance(head.get("facts"), dict) and is_head(head.get("asked"))


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def _is_stop(value) -> bool:
    return isinstance(value, str) and value != ""


def _bar(total: int, what: str, quiet: bool):
    return tqdm(total=total, desc=what, disable=quiet, file=sys.stderr)
