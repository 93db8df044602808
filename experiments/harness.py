"""EleutherAI's evaluation harness drives our models: the adapter between its requests and our programs.

It imports lm_eval, which only requirements-eval.txt installs; experiments/questions.py imports this module
after it has looked for it.
"""

import itertools
import sys
from collections.abc import Iterator

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.errors import InputError
from tree_ffn.models import decode, scoring
from tree_ffn.models.spec import ModelSpec

MOST_NEW_TOKENS = 256  # of a task that names no number, as with the harness's own backends


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Tokens are those of the text alone: no token is put before it. Only what would have nothing before it (an
    empty context, the first window of a rolling likelihood) follows the tokenizer's end-of-document token.
    A pair or prompt that is too long for the context loses its left end.

    Args:
      spec, variables: the model.
      tokenizer: the one it was trained with.
      batch_tokens: about how many tokens run at once.
    """

    def __init__(self, spec: ModelSpec, variables: dict, tokenizer: Tokenizer, batch_tokens: int = 8192):
        super().__init__()
        self.spec, self.variables, self.text = spec, variables, tokenizer
        self.batch_tokens = batch_tokens
        self._decoding: tuple[ModelSpec, dict] | None = None

    @property
    def eot_token_id(self) -> int:
        return self.text.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return [int(token) for token in self.text.encode(string)]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        for (context, continuation), context_ids, continuation_ids in requests:
            if not (context_ids and continuation_ids):
                raise InputError(
                    f"prompt: {context[-40:]!r} with {continuation[:40]!r} has no tokens to read or to score."
                )
        pairs = [(context_ids, continuation_ids) for _, context_ids, continuation_ids in requests]
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm, file=sys.stderr) as bar:
            found = scoring.score(self.spec, self.variables, pairs, self.batch_tokens, bar.update)
        answers = [(one.log_likelihood, one.is_greedy) for one in found]
        for (text, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.spec.context, context_len=1)
            for context_ids, continuation_ids in map(make_disjoint_window, rolling):
                windows.append((("", ""), context_ids, continuation_ids))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        jobs = [self._job(i, *request.args) for i, request in enumerate(requests)]
        with tqdm(total=len(jobs), desc="answers", disable=disable_tqdm, file=sys.stderr) as bar:
            for (length, n_new, sampling), group in itertools.groupby(sorted(jobs), key=lambda job: job[0]):
                for batch in _chunks(list(group), max(1, self.batch_tokens // (length + n_new))):
                    prompts, untils = [job[2] for job in batch], [job[3] for job in batch]
                    texts = self._continue(prompts, untils, n_new, decode.Sampling(*sampling))
                    for (_, i, *_), text in zip(batch, texts):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return answers

    def _job(self, i: int, prompt: str, options: dict):
        """((prompt tokens, new tokens, sampling), request, prompt ids, stop strings)."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        n_new = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
        n_new = max(1, min(n_new, self.spec.context - 1))
        ids = self.tok_encode(prompt)[-(self.spec.context - n_new) :] or [self.prefix_token_id]
        greedy = not options.get("do_sample", False) or not options.get("temperature", 1.0)
        sampling = (
            greedy,
            options.get("temperature") or 1.0,
            options.get("top_k", 0),
            options.get("top_p", 1.0),
        )
        return (len(ids), n_new, sampling), i, ids, until

    def _continue(self, prompts, untils, n_new: int, sampling: decode.Sampling) -> list[str]:
        """What follows prompts of one length, each up to its first stop string or the end of the document."""
        if self._decoding is None:
            self._decoding = decode.for_decoding(self.spec, self.variables)
        made: list[list[int]] = [[] for _ in prompts]
        finished: list[str | None] = [None] * len(prompts)
        for token_B in decode.stream(*self._decoding, prompts, n_new, sampling):
            for b, token in enumerate(token_B.tolist()):
                if finished[b] is not None:
                    continue
                if token == self.eot_token_id:
                    finished[b] = self.text.decode(made[b])
                    continue
                made[b].append(token)
                text = self.text.decode(made[b])
                stops = [text.find(stop) for stop in untils[b] if stop in text]
                if stops:
                    finished[b] = text[: min(stops)]
            if all(text is not None for text in finished):
                break
        return [self.text.decode(ids) if text is None else text for ids, text in zip(made, finished)]


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
