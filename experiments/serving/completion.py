"""What a client asks for, in OpenAI's form of /v1/completions: read, checked, and turned into requests."""

import dataclasses
from typing import Any

from experiments.common.loaded import Loaded
from experiments.serving import choosing
from experiments.serving.fields import MOST_INT, Fields, is_id, shown
from experiments.serving.refusal import Refusal, blaming
from tree_ffn.errors import InputError
from tree_ffn.inference.batching import Request
from tree_ffn.inference.detokenize import Characters

MOST_TOP = 5


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request body.

    Attributes:
      prompts: (ids, the text that echo repeats) of every prompt.
      requests: prompt-major, n for each prompt.
      n, logprobs, echo, stream, include_usage, stops: as the client gave them.
      end_ids: tokens that end a text.
    """

    prompts: list[tuple[tuple[int, ...], str]]
    requests: list[Request]
    n: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    end_ids: frozenset[int]


def parse(body: Any, model: Loaded, name: str, most: int) -> Completion:
    """Checks the body of a request.

    Args:
      body: JSON values.
      model: what will answer.
      name: of the model, for clients.
      most: sequences that one body may ask for.

    Raises:
      Refusal: names the field, the value and what is allowed.
    """
    fields = Fields(body)
    check_model(fields, name)
    asked = _prompts(fields.take("prompt", (str, list), ""))
    echo = fields.take("echo", bool, False)
    logprobs = fields.number("logprobs", int, None, 0, MOST_TOP)
    n_tokens = fields.number("max_tokens", int, 16, 0, MOST_INT)
    if n_tokens == 0 and not echo:
        raise Refusal(400, "max_tokens: 0 is only allowed with echo.", "max_tokens")
    most_read = most_prompt(fields, model, n_tokens)
    prompts = [_prompt(one, model, most_read) for one in asked]
    return assembled(fields, model, most, prompts, n_tokens, logprobs, echo)


def check_model(fields: Fields, name: str) -> None:
    """Raises Refusal where another model is asked for."""
    if (asked := fields.take("model", str, name)) != name:
        raise Refusal(404, f"model: {shown(asked)} is not served here; use {name!r}.", "model")


def most_prompt(fields: Fields, model: Loaded, n_tokens: int) -> int | None:
    """How many of a prompt's last ids are read; None: all, and a prompt that is too long is refused.

    Args:
      fields: of the request.
      model: with its context.
      n_tokens: that are to follow the prompt.
    """
    name = "truncate_prompt_tokens"
    most = fields.number(name, int, None, -1, MOST_INT)
    if most == 0:
        raise Refusal(400, f"{name}: 0 is not allowed; use -1 for what fits, or a number from 1.", name)
    return max(1, model.spec.max_seq_len - n_tokens) if most == -1 else most


def assembled(
    fields: Fields,
    model: Loaded,
    most: int,
    prompts: list[tuple[tuple[int, ...], str]],
    n_tokens: int,
    logprobs: int | None,
    echo: bool = False,
) -> Completion:
    """The request to continue some prompts, by what is left of the fields.

    Args:
      fields: of the request, without those already read.
      model: what answers.
      most: answers of one request.
      prompts: ids and text of each.
      n_tokens: that follow each at most.
      logprobs: how many alternatives of each token are told; None tells none.
      echo: the answer begins with the prompt.

    Raises:
      Refusal: a field is wrong, or nobody knows it.
    """
    n = choosing.n_answers(fields, most)
    if len(prompts) * n > most:
        raise Refusal(
            400, f"prompt: {len(prompts)} prompts, each n = {n} times, are more than {most}.", "prompt"
        )
    stream = fields.take("stream", bool, False)
    seed, sampling = choosing.seed(fields), choosing.sampling(fields)
    penalties = choosing.penalties(fields, model.spec.vocab_size)
    # What is only repeated is read nevertheless, as what is scored.
    scored = echo and (logprobs is not None or n_tokens == 0)
    requests = [
        Request(ids, n_tokens, sampling, (seed + i) % 2**32, scored, logprobs, penalties)
        for ids, _ in prompts
        for i in range(n)
    ]
    found = Completion(
        prompts, requests, n, logprobs, echo, stream, choosing.include_usage(fields, stream),
        choosing.stops(fields), choosing.end_ids(fields, model.tokenizer.end_id, model.spec.vocab_size),
    )  # fmt: skip
    fields.finish()
    for one in requests:
        _check(one, model)
    return found


def _prompts(value) -> list:
    """One prompt or several, as a list of texts and of lists of ids."""
    if isinstance(value, str) or (value and all(is_id(one) for one in value)):
        return [value]
    if value and all(isinstance(one, str) for one in value):
        return value
    if value and all(isinstance(one, list) and all(is_id(i) for i in one) for one in value):
        return value
    raise Refusal(400, "prompt: use a text, a list of token ids, or a list of either, not empty.", "prompt")


def _prompt(value, model: Loaded, most: int | None) -> tuple[tuple[int, ...], str]:
    """A prompt's ids, the last of them if there are too many, and the text that echo repeats."""
    if isinstance(value, str):
        with blaming("prompt"):
            ids = model.prompt(value)
    else:
        ids = tuple(value)
    if most is None or len(ids) <= most:
        return ids, value if isinstance(value, str) else _text(ids, model)
    # What stands before every text stays, as with the tokenizers of transformers.
    n_kept = len(model.begins_with) if isinstance(value, str) and len(model.begins_with) < most else 0
    ids = (*ids[:n_kept], *ids[len(ids) - most + n_kept :])
    return ids, _text(ids, model)


def _text(ids: tuple[int, ...], model: Loaded) -> str:
    # A character that the last ids begin is part of the answer.
    return "".join(map(Characters(model.tokenizer).push, ids))


def _check(request: Request, model: Loaded) -> None:
    """Raises Refusal where the model cannot do it."""
    try:
        request.check(model.spec)
    except InputError as error:
        field, _, rest = str(error).partition(":")
        field = "max_tokens" if field == "tokens" else field
        too_long = len(request.prompt) + request.n_tokens > model.spec.max_seq_len
        raise Refusal(
            400, f"{field}:{rest}", field, "context_length_exceeded" if too_long else None
        ) from None
