"""What a client asks for, in OpenAI's form of /v1/completions: read, checked, and turned into requests."""

import dataclasses
import secrets
from typing import Any

from experiments.loaded import Loaded
from experiments.serving.fields import MOST_INT, Fields, is_id, shown
from experiments.serving.refusal import Refusal, blaming
from tree_ffn.data.text_stream import Characters
from tree_ffn.errors import InputError
from tree_ffn.json_input import check_characters
from tree_ffn.models.batch import Request
from tree_ffn.models.sampling import Sampling

MOST_TOP, MOST_STOPS, MOST_TEMPERATURE = 5, 32, 2.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request body.

    Attributes:
      prompts: (ids, the text that echo repeats) of every prompt.
      echo, stream, include_usage, stops, n, logprobs: as the client gave them.
      requests: prompt-major, n for each prompt.
    """

    prompts: list[tuple[tuple[int, ...], str]]
    requests: list[Request]
    echo: bool
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    n: int
    logprobs: int | None


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
    if fields.take("model", str, name) != name:
        raise Refusal(404, f"model: {shown(body['model'])} is not served here; use {name!r}.", "model")
    prompts = [_prompt(one, model) for one in _prompts(fields.take("prompt", (str, list), ""))]
    n = _n(fields, most)
    if len(prompts) * n > most:
        raise Refusal(
            400, f"prompt: {len(prompts)} prompts, each n = {n} times, are more than {most}.", "prompt"
        )
    echo, stream = fields.take("echo", bool, False), fields.take("stream", bool, False)
    logprobs = fields.number("logprobs", int, None, 0, MOST_TOP)
    n_tokens = fields.number("max_tokens", int, 16, 0, MOST_INT)
    if n_tokens == 0 and not echo:
        raise Refusal(400, "max_tokens: 0 is only allowed with echo.", "max_tokens")
    seed = fields.number("seed", int, None, -(2**63), 2**64 - 1)
    seed = secrets.randbits(32) if seed is None else seed % 2**32
    sampling, stops, include_usage = _sampling(fields), _stops(fields), _include_usage(fields, stream)
    fields.finish()
    # What is only repeated is read nevertheless, as what is scored.
    scored = echo and (logprobs is not None or n_tokens == 0)
    requests = [
        Request(ids, n_tokens, sampling, (seed + i) % 2**32, scored, logprobs)
        for ids, _ in prompts
        for i in range(n)
    ]
    for one in requests:
        _check(one, model)
    return Completion(prompts, requests, echo, stream, include_usage, stops, n, logprobs)


def _n(fields: Fields, most: int) -> int:
    """How many answers to each prompt; as many candidates are made, and no more."""
    n = fields.number("n", int, 1, 1, most)
    if (best_of := fields.take("best_of", int, n)) != n:
        raise Refusal(
            400, f"best_of: {shown(best_of)} is not supported; use {n}, as n is, or leave it out.", "best_of"
        )
    return n


def _prompts(value) -> list:
    """One prompt or several, as a list of texts and of lists of ids."""
    if isinstance(value, str) or (value and all(is_id(one) for one in value)):
        return [value]
    if value and all(isinstance(one, str) for one in value):
        return value
    if value and all(isinstance(one, list) and all(is_id(i) for i in one) for one in value):
        return value
    raise Refusal(400, "prompt: use a text, a list of token ids, or a list of either, not empty.", "prompt")


def _prompt(value, model: Loaded) -> tuple[tuple[int, ...], str]:
    """A prompt's ids, and the text that echo repeats."""
    if isinstance(value, list):
        # A character that the last ids begin is part of the answer.
        return tuple(value), "".join(map(Characters(model.tokenizer).push, value))
    with blaming("prompt"):
        return model.prompt(value), value


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", float, 1.0, 0, MOST_TEMPERATURE)
    top_p, top_k = fields.number("top_p", float, 1.0, 0, 1), fields.number("top_k", int, 0, -1, MOST_INT)
    try:
        return Sampling(temperature == 0, temperature or 1.0, max(top_k, 0), top_p)
    except InputError as error:
        raise Refusal(400, str(error), str(error).partition(":")[0]) from None


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop", (str, list), [])
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MOST_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise Refusal(400, f"stop: use a string or at most {MOST_STOPS} strings, none of them empty.", "stop")
    with blaming("stop"):
        for one in stops:
            check_characters(one, "stop")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", dict, {})
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    if asked and not (stream and list(asked) == ["include_usage"] and asked["include_usage"] is True):
        raise Refusal(
            400, "stream_options: only include_usage is known, and only with stream.", "stream_options"
        )
    return bool(asked)


def _check(request: Request, model: Loaded) -> None:
    """Raises Refusal where the model cannot do it."""
    try:
        request.check(model.spec)
    except InputError as error:
        field, _, rest = str(error).partition(":")
        field = "max_tokens" if field == "tokens" else field
        too_long = len(request.prompt) + request.n_tokens > model.spec.context
        raise Refusal(
            400, f"{field}:{rest}", field, "context_length_exceeded" if too_long else None
        ) from None
