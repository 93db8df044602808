"""Text from a trained or imported model.

    python -m experiments.generate --workdir=runs/tree --prompt="def mean(values):" --tokens=100
    python -m experiments.generate --export=exported/tree --prompt="import " --greedy
    python -m experiments.generate --export=exported/opt --prompt="One" --prompt="Two" --stop=$'\\n'
    python -m experiments.generate --export=exported/opt --prompts=prompts.jsonl --to=texts.jsonl

The text of one prompt goes to stdout as it is made, the speed to stderr. Several prompts are continued
together, each as if it were alone; their texts follow in the order of the prompts. Sampling follows
--temperature, --top_k and --top_p; the same --seed gives the same text. The text ends before a --stop. The
prompt of an imported model follows what its texts begin with (OPT's </s>; nothing for GPT-2), unprinted.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, loaded, path_flags
from experiments.common.prompts import read_prompts
from experiments.lm_harness.continued import continued
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.inference.batching import Batch, Request
from tree_ffn.inference.sampling import Sampling
from tree_ffn.tree.kernels import first_use

_WORKDIR = path_flags.define("workdir", None, "Directory of a training run; its best checkpoint is used.")
_EXPORT = path_flags.define("export", None, "Directory of an exported model (experiments/export.py).")
_TOKENIZER = path_flags.define_each("tokenizer", None, "Where the model's tokenizer is now, if it has moved.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue, may be given several times; none begins a document."
)
_PROMPTS = path_flags.define(
    "prompts", None, 'File of prompts: one a line, or JSON of strings or {"prompt": ...}, packed or not.'
)
_TO = path_flags.define_written("to", None, 'Write {"prompt", "text"} of each prompt to this .jsonl instead.')
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens to make; by default 200, or what the context has room for."
)
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the text, may be given several times.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Scores are divided by it.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Choose among the k likeliest tokens; 0: among all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Choose among the likeliest tokens that make up this probability.")
_GREEDY = flags.DEFINE_bool("greedy", False, "Always take the likeliest token.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random choices; the same for every prompt.")
_ROWS = flags.DEFINE_integer("rows", 16, "The most prompts that are continued at once.")


def main() -> None:
    sampling = Sampling(_GREEDY.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    check_positive_int("--rows", _ROWS.value)
    if "" in _STOP.value:
        raise InputError("--stop: '' is not allowed; use at least one character.")
    if _PROMPTS.value is not None and _PROMPT.value:
        raise InputError("--prompt and --prompts: give one of them.")
    prompts = read_prompts(Path(_PROMPTS.value)) if _PROMPTS.value is not None else _PROMPT.value or [""]
    first_use.build("cpu", "gpu")
    model = loaded.load(_WORKDIR.value, _EXPORT.value, _TOKENIZER.value).for_decoding()
    requests = []
    for ids in map(model.prompt, prompts):
        room = max(1, min(200, model.spec.max_seq_len - len(ids)))
        requests.append(Request(ids, room if _TOKENS.value is None else _TOKENS.value, sampling, _SEED.value))
    for one in requests:
        one.check(model.spec)
    batch = Batch(model.spec, model.variables, _ROWS.value)
    speed = Speed()
    pieces = speed.watch(continued(batch, requests, model.tokenizer, [_STOP.value] * len(requests)))
    if _TO.value is None:
        show(prompts, pieces)
    else:
        write(prompts, pieces, _TO.value)
    if speed.value:
        print(f"{speed.value:,.1f} tokens/s; compiled in {speed.compiled:.1f} s", file=sys.stderr)


def show(prompts: list[str], pieces: Iterable[tuple[int, str, bool]]) -> None:
    """Prints prompts with their texts, in order: that of the first one not yet ended as it is made."""
    texts, ended, now = list(prompts), [False] * len(prompts), 0
    print(prompts[0], end="", flush=True)
    for place, text, last in pieces:
        texts[place] += text
        ended[place] = last
        if place == now:
            print(text, end="", flush=True)
        while now < len(prompts) and ended[now]:
            now += 1
            print("\n\n" + texts[now] if now < len(prompts) else "\n", end="", flush=True)


def write(prompts: list[str], pieces: Iterable[tuple[int, str, bool]], path: str) -> None:
    """Writes prompts with their texts to a file; what it held stays until all are there.

    Args:
      prompts: in order.
      pieces: (prompt's place, text, whether it is the last) as they come.
      path: of the file.

    Raises:
      InputError: the file cannot be written.
    """
    texts = [""] * len(prompts)
    try:
        with open(path, "a", encoding="utf-8"):  # what cannot be written is known before the work
            pass
        for place, text, _ in pieces:
            texts[place] += text
        with open(path, "w", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts):
                file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"--to: {path!r} cannot be written: {error.strerror}.") from None


class Speed:
    """Tokens a second of all that passes by, from the first on; what compiling takes is told apart.

    Attributes:
      value: tokens a second; 0 of fewer than two.
      compiled: seconds of compiling.
    """

    def __init__(self):
        self.value = self.compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, the compiler
            self.compiled += seconds

    def watch(self, pieces: Iterator) -> Iterator:
        """The same pieces, one a token."""
        n_made, started, before = -1, 0.0, 0.0
        for n_made, piece in enumerate(pieces):
            if not n_made:
                started, before = time.perf_counter(), self.compiled
            yield piece
        if n_made > 0:
            self.value = n_made / max(time.perf_counter() - started - (self.compiled - before), 1e-9)


if __name__ == "__main__":
    cli.run(main, prints=lambda: _TO.value is None)
