"""What the evaluation harness asks of a model: how likely a continuation is, and how a prompt goes on."""

import sys
from collections.abc import Sequence
from typing import Protocol

from tqdm import tqdm

from experiments.common.loaded import Loaded
from experiments.lm_harness.continued import continued
from tree_ffn.inference import decode, scoring
from tree_ffn.inference.batching import Batch, Request

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of a continuation
BATCH_TOKENS = 8192


class Answerer(Protocol):
    """Who answers.

    `likelihoods` gives (log-likelihood in nats, whether it is the greedy one) of every pair, and `texts` how
    every request goes on until one of its stop strings.
    """

    def likelihoods(self, pairs: Sequence[Pair], quiet: bool) -> list[tuple[float, bool]]: ...

    def texts(self, asked: Sequence[Request], stops: Sequence[list[str]], quiet: bool) -> list[str]:
        """The answer to each request.

        Args:
          asked: prompts and how many tokens follow each.
          stops: of each request the strings that end its answer.
          quiet: show no progress bar.
        """
        ...


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


def _bar(total: int, what: str, quiet: bool):
    return tqdm(total=total, desc=what, disable=quiet, file=sys.stderr)
