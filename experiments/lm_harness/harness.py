"""EleutherAI's evaluation harness drives our models: the adapter between its requests and our programs.

It imports lm_eval, which the extra `eval` installs; experiments/lm_harness/questions.py imports this module
after it has looked for it.
"""

import collections
import dataclasses

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from experiments.common.loaded import Loaded
from experiments.lm_harness.answering import Answerer, Answering
from experiments.lm_harness.kept import Kept
from experiments.lm_harness.task_options import read_options
from tree_ffn.errors import InputError
from tree_ffn.inference.batching import Request


class HarnessModel(TemplateLM):
    """A model as the harness sees it, with the tokens and windows of the harness's own backend `hf`.

    What stands before every text of an imported model (OPT's `</s>`, nothing of GPT-2) stands before
    contexts, prompts and whole texts. What would have nothing before it (an empty context, the first window
    of a whole text) follows the first of these, or the tokenizer's end-of-document token; so the rolling
    likelihood of an OPT predicts its leading `</s>` too. A pair or prompt that is too long for the context
    loses its left end, which `kept` counts. Unlike there, text that spells a special token is still text, and
    a task that names no number of new tokens leaves room for the question (`task_options.Options.room`).

    Args:
      model: as `loaded.load` returns it.
      answerer: who answers; the model, if it is not named.

    Attributes:
      kept: what of all that was asked so far the context had room for.
    """

    def __init__(self, model: Loaded, answerer: Answerer | None = None):
        super().__init__()
        self.context, self.text, self.begins_with = model.spec.max_seq_len, model.tokenizer, model.begins_with
        self.answerer = answerer or Answering(model)
        self.kept = Kept()

    @property
    def eot_token_id(self) -> int:
        return self.text.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.begins_with[0] if self.begins_with else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        begin = [] if add_special_tokens is False else self.begins_with
        return [*begin, *self.text.encode(string).tolist()]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        for (context, continuation), context_ids, continuation_ids in requests:
            if not (context_ids and continuation_ids):
                raise InputError(
                    f"prompt: {context[-40:]!r} with {continuation[:40]!r} has no tokens to read or to score."
                )
            if len(continuation_ids) > self.context:
                raise InputError(
                    f"answer: {continuation[:40]!r} has {len(continuation_ids)} tokens, which do not fit the "
                    f"model's context of {self.context}; use a model with a longer one."
                )
            # The last token is predicted and not read.
            self.kept.add(len(context_ids), self.context + 1 - len(continuation_ids))
        pairs = [(context_ids, continuation_ids) for _, context_ids, continuation_ids in requests]
        answers = self.answerer.likelihoods(pairs, disable_tqdm)
        for (text, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.context, context_len=1)
            for context_ids, continuation_ids in map(make_disjoint_window, rolling):
                windows.append((("", ""), context_ids, continuation_ids))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked, times = [], collections.Counter()
        for request in requests:
            one = self._request(*request.args)
            # A question that is asked several times, which only sampling makes sense of, has several answers.
            asked.append(dataclasses.replace(one, seed=one.seed + times[id(request)]))
            times[id(request)] += not one.sampling.greedy
        stops = [read_options(request.args[1], self.context).stops for request in requests]
        answers = self.answerer.texts(asked, stops, disable_tqdm)
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _request(self, prompt: str, options: dict) -> Request:
        """A prompt, cut on the left where it does not fit beside its answer."""
        how, ids = read_options(options, self.context), self.tok_encode(prompt) or [self.prefix_token_id]
        n_new = how.room(len(ids), self.context)
        self.kept.add(len(ids), self.context - n_new)
        return Request(tuple(ids[-(self.context - n_new) :]), n_new, how.sampling, how.seed)
