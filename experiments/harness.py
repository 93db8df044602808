"""EleutherAI's evaluation harness drives our models: the adapter between its requests and our programs.

It imports lm_eval, which only requirements-eval.txt installs; experiments/questions.py imports this module
after it has looked for it.
"""

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from experiments.answering import Answerer, Answering
from experiments.loaded import Loaded
from tree_ffn.errors import InputError
from tree_ffn.models.batch import Request
from tree_ffn.models.sampling import Sampling

MOST_NEW_TOKENS = 256  # of a task that names no number, as with the harness's own backends


class HarnessModel(TemplateLM):
    """A model as the harness sees it, with the tokens and windows of the harness's own backend `hf`.

    What stands before every text of an imported model (OPT's `</s>`, nothing of GPT-2) stands before
    contexts, prompts and whole texts. What would have nothing before it (an empty context, the first window
    of a whole text) follows the first of these, or the tokenizer's end-of-document token; so the rolling
    likelihood of an OPT predicts its leading `</s>` too. A pair or prompt that is too long for the context
    loses its left end. Unlike there, text that spells a special token is still text.

    Args:
      model: as `loaded.load` returns it.
      answerer: who answers; the model, if it is not named.
    """

    def __init__(self, model: Loaded, answerer: Answerer | None = None):
        super().__init__()
        self.context, self.text, self.begins_with = model.spec.context, model.tokenizer, model.begins_with
        self.answerer = answerer or Answering(model)

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
        asked = [self._request(*request.args) for request in requests]
        stops = [_stops(request.args[1]) for request in requests]
        answers = self.answerer.texts(asked, stops, disable_tqdm)
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _request(self, prompt: str, options: dict) -> Request:
        """Greedy unless the task samples; seeds are all the same: a request's answer is its own."""
        n_new = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
        n_new = max(1, min(n_new, self.context - 1))
        ids = self.tok_encode(prompt)[-(self.context - n_new) :] or [self.prefix_token_id]
        greedy = not options.get("do_sample", False) or not options.get("temperature", 1.0)
        temperature = options.get("temperature") or 1.0
        sampling = Sampling(greedy, temperature, options.get("top_k", 0), options.get("top_p", 1.0))
        return Request(tuple(ids), n_new, sampling)


def _stops(options: dict) -> list[str]:
    """What ends an answer; an empty string ends none."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
