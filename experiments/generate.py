"""Text from a trained model.

    python -m experiments.generate --workdir=runs/tree --prompt="def mean(values):" --tokens=100
    python -m experiments.generate --export=exported/tree --prompt="import " --greedy

The text goes to stdout as it is made, the speed to stderr. Sampling follows
--temperature, --top_k and --top_p; the same --seed gives the same text.
"""

import sys
import time
from collections.abc import Iterator

from absl import flags

from experiments import cli, loaded
from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.models import decode

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run; its best checkpoint is used.")
_EXPORT = flags.DEFINE_string("export", None, "Directory of an exported model (experiments/export.py).")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; none begins a document.")
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens to make; by default 200, or what the context has room for."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Scores are divided by it.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Choose among the k likeliest tokens; 0: among all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Choose among the likeliest tokens that make up this probability.")
_GREEDY = flags.DEFINE_bool("greedy", False, "Always take the likeliest token.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random choices.")


def main() -> None:
    sampling = decode.Sampling(_GREEDY.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    spec, variables, tokenizer, begins_with, _ = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value)
    prompt = [*begins_with, *(int(i) for i in tokenizer.encode(_PROMPT.value))] or [tokenizer.end_id]
    n_tokens = _TOKENS.value
    if n_tokens is None:
        n_tokens = max(1, min(200, spec.context - len(prompt)))

    spec, variables = decode.for_decoding(spec, variables)
    tokens = decode.stream(spec, variables, [prompt], n_tokens, sampling, _SEED.value)
    print(_PROMPT.value, end="", flush=True)
    started, n_made = None, 0
    for text in readable(tokens, tokenizer):
        print(text, end="", flush=True)
        if started is None:  # the first token also pays for compiling
            started = time.perf_counter()
        else:
            n_made += 1
    print()
    if started is not None and n_made:
        print(f"{n_made / (time.perf_counter() - started):.1f} tokens/s", file=sys.stderr)


def readable(tokens: Iterator, tokenizer: Tokenizer) -> Iterator[str]:
    """The text that each token adds, up to the end of the document.

    A character may take several tokens: what is not yet whole waits for the next.
    """
    ids: list[int] = []
    shown = ""
    for token_B in tokens:
        if int(token_B[0]) == tokenizer.end_id:
            break
        ids.append(int(token_B[0]))
        text = tokenizer.decode(ids)
        whole = text.rstrip("\ufffd")
        yield whole[len(shown) :]
        shown = max(shown, whole, key=len)
    yield tokenizer.decode(ids)[len(shown) :] if ids else ""


if __name__ == "__main__":
    cli.run(main)
