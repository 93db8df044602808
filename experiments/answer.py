"""Answers what the evaluation harness asks, on a machine that has not the harness.

    python -m experiments.evaluate --ask=asked.jsonl.xz --context=512 --tokenizer=TOKENIZER \\
        --tasks=hellaswag,piqa --task_data=DATA                                    # where the harness is
    python -m experiments.answer --asked=asked.jsonl.xz --workdir=runs/tree --to=answers.jsonl.xz
    python -m experiments.evaluate --answers=answers.jsonl.xz --tokenizer=TOKENIZER \\
        --tasks=hellaswag,piqa --task_data=DATA --results=results/t3_small.jsonl --row=tree

The first command writes the tokens of every question, each once. The second, on any machine, needs the model
and its tokenizer alone. The third has the harness make its scores of the answers: the same as if it had asked
the model itself. With --results, questions are answered a second time; both times are rows of table
answer_speed.
"""

import time

from absl import flags

from experiments.common import cli, loaded, path_flags
from experiments.lm_eval import answering
from experiments.reporting import record
from tree_ffn.errors import InputError, check_positive_int

_ASKED = path_flags.define("asked", None, "What experiments.evaluate --ask wrote.")
_TO = path_flags.define_written("to", None, "File for the answers; .xz packs it.", (".xz",))
_WORKDIR = path_flags.define("workdir", None, "Directory of a training run.")
_EXPORT = path_flags.define("export", None, "Instead of a run: an exported model's directory.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_TOKENIZER = path_flags.define_each("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", answering.BATCH_TOKENS, "About how many tokens run at once."
)
_RESULTS = path_flags.define_written("results", None, "Append the speed to this results file (JSONL).")
_ROW = flags.DEFINE_string("row", None, "Name of the results rows.")


def main() -> None:
    for flag in (_ASKED, _TO):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name a file.")
    check_positive_int("--batch_tokens", _BATCH_TOKENS.value)
    record.check_row_flag(_RESULTS.value, _ROW.value)
    head, questions = answering.read_asked(_ASKED.value)
    model = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value, _STEP.value)
    answering.check_fits(head, model)
    for question in questions:
        if "continuation" not in question:
            answering.request_of(question).check(model.spec)
    answerer = answering.Answering(model, _BATCH_TOKENS.value)
    answers, cold = timed(answerer, questions)
    first = {"facts": model.facts, "asked": head, "device": record.device_name()}
    answering.write_lines(_TO.value, first, answers, "to")
    print(f"{len(answers):,} questions answered in {cold:.1f} s, compiling included: {_TO.value}")
    if _RESULTS.value:
        _, warm = timed(answerer, questions)
        print(f"again in {warm:.1f} s: {len(answers) / warm:,.0f} a second")
        write_speed(model.facts, questions, cold, warm)


def timed(answerer: answering.Answerer, questions: list[dict]) -> tuple[list[dict], float]:
    """The answers, and the seconds they took."""
    start = time.perf_counter()
    answers = answering.answer_all(answerer, questions)
    return answers, time.perf_counter() - start


def write_speed(facts: dict, questions: list[dict], cold: float, warm: float) -> None:
    """Rows of table answer_speed: questions a second, of the first time and of the second; tokens of that."""
    tokens = sum(
        len(one.get("context", one.get("prompt"))) + len(one.get("continuation", ())) for one in questions
    )
    scored = {"questions": len(questions), "tokens": tokens, "batch_tokens": _BATCH_TOKENS.value}
    values = {
        "questions_per_s": len(questions) / warm, "questions_per_s_cold": len(questions) / cold,
        "tokens_per_s": tokens / warm,
    }  # fmt: skip
    rows = [
        record.make_row(
            "answer_speed", _ROW.value, metric, value, None, {**facts, "scored": scored},
            "tokens/s" if metric == "tokens_per_s" else "questions/s",
        )
        for metric, value in values.items()
    ]  # fmt: skip
    record.append_rows(_RESULTS.value, rows)


if __name__ == "__main__":
    cli.run(main)
