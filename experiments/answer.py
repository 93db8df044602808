"""Answers what the evaluation harness asks, on a machine that has not the harness.

    python -m experiments.evaluate --ask=asked.jsonl.xz --context=512 --tokenizer=TOKENIZER \\
        --tasks=hellaswag,piqa --task_data=DATA                                    # where the harness is
    python -m experiments.answer --asked=asked.jsonl.xz --workdir=runs/tree --to=answers.jsonl.xz
    python -m experiments.evaluate --answers=answers.jsonl.xz --tokenizer=TOKENIZER \\
        --tasks=hellaswag,piqa --task_data=DATA --results=results/t3_small.jsonl --row=tree

The first command writes the tokens of every question, each once. The second, on any machine, needs the model
and its tokenizer alone. The third has the harness make its scores of the answers: the same as if it had asked
the model itself.
"""

import time

from absl import flags

from experiments import answering, cli, loaded
from tree_ffn.errors import InputError, check_positive_int

_ASKED = flags.DEFINE_string("asked", None, "What experiments.evaluate --ask wrote.")
_TO = flags.DEFINE_string("to", None, "File for the answers; .xz packs it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_EXPORT = flags.DEFINE_string("export", None, "Instead of a run: an exported model's directory.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation loss), latest, or a step.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", answering.BATCH_TOKENS, "About how many tokens run at once."
)


def main() -> None:
    for flag in (_ASKED, _TO):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing; name a file.")
    check_positive_int("--batch_tokens", _BATCH_TOKENS.value)
    head, *questions = answering.read_lines(_ASKED.value, "asked", ("context", "tokenizer_sha256"))
    model = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value, _STEP.value)
    check_fits(head, model)
    start = time.perf_counter()
    answers = answering.answer_all(answering.Answering(model, _BATCH_TOKENS.value), questions)
    seconds = time.perf_counter() - start
    answering.write_lines(_TO.value, {"facts": model.facts, "asked": head}, answers, "to")
    print(
        f"{len(answers):,} questions answered in {seconds:.1f} s, {len(answers) / seconds:,.0f} a second "
        f"with compiling: {_TO.value}"
    )


def check_fits(head: dict, model: loaded.Loaded) -> None:
    """Raises InputError unless questions were asked in the model's tokens and for its context."""
    own = {
        "tokenizer_sha256": model.tokenizer.fingerprint, "context": model.spec.context,
        "begins_with": model.begins_with,
    }  # fmt: skip
    for name, value in own.items():
        if head.get(name) != value:
            raise InputError(
                f"--asked: {name} of the questions is {head.get(name)!r}, the model's {value!r}; ask again "
                "with the model's tokenizer, context and beginning."
            )


if __name__ == "__main__":
    cli.run(main)
