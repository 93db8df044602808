"""The fields that say how tokens are chosen and where a text ends; /v1/completions and chat share them."""

import secrets
from typing import Any

from experiments.serving.fields import MOST_INT, Fields, is_id, shown
from experiments.serving.refusal import Refusal, blaming
from tree_ffn.errors import InputError
from tree_ffn.inference.penalties import LEAST_REPETITION, MOST_REPETITION, Penalties
from tree_ffn.inference.sampling import Sampling
from tree_ffn.json_input import check_characters

MOST_STOPS, MOST_TEMPERATURE, MOST_PENALTY, MOST_BIAS = 32, 2.0, 2.0, 100.0


def n_answers(fields: Fields, most: int) -> int:
    """How many answers to each prompt; as many candidates are made, and no more."""
    n = fields.number("n", int, 1, 1, most)
    if (best_of := fields.take("best_of", int, n)) != n:
        raise Refusal(
            400, f"best_of: {shown(best_of)} is not supported; use {n}, as n is, or leave it out.", "best_of"
        )
    return n


def seed(fields: Fields) -> int:
    """The seed of the first answer, of 32 bits; chance decides where none is named."""
    value = fields.number("seed", int, None, -(2**63), 2**64 - 1)
    return secrets.randbits(32) if value is None else value % 2**32


def sampling(fields: Fields) -> Sampling:
    """The rule by which tokens are drawn; a temperature of 0 takes the likeliest."""
    temperature = fields.number("temperature", float, 1.0, 0, MOST_TEMPERATURE)
    top_p, top_k = fields.number("top_p", float, 1.0, 0, 1), fields.number("top_k", int, 0, -1, MOST_INT)
    min_p = fields.number("min_p", float, 0.0, 0, 1)
    try:
        return Sampling(temperature == 0, temperature or 1.0, max(top_k, 0), top_p, min_p)
    except InputError as error:
        raise Refusal(400, str(error), str(error).partition(":")[0]) from None


def penalties(fields: Fields, vocab_size: int) -> Penalties:
    """What changes the scores before."""
    presence, frequency = (
        fields.number(f"{name}_penalty", float, 0.0, -MOST_PENALTY, MOST_PENALTY)
        for name in ("presence", "frequency")
    )
    repetition = fields.number("repetition_penalty", float, 1.0, LEAST_REPETITION, MOST_REPETITION)
    biases = fields.take("logit_bias", dict, {})
    pairs = sorted((_id(name, vocab_size), _bias(value)) for name, value in biases.items())
    return Penalties(presence, frequency, repetition, tuple(pairs))


def _id(name: str, vocab_size: int) -> int:
    # Ids are written as Python and JavaScript write them: one spelling each.
    if not (name.isascii() and name.isdecimal() and len(name) < 11 and str(int(name)) == name):
        raise Refusal(400, f"logit_bias: {shown(name)} is not allowed; use token ids as names.", "logit_bias")
    if int(name) >= vocab_size:
        raise Refusal(
            400, f"logit_bias: token {name} is not allowed; use 0 to {vocab_size - 1}.", "logit_bias"
        )
    return int(name)


def _bias(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -MOST_BIAS <= value <= MOST_BIAS:
        raise Refusal(
            400,
            f"logit_bias: {shown(value)} is not allowed; use numbers from {-MOST_BIAS} to {MOST_BIAS}.",
            "logit_bias",
        )
    return float(value)


def stops(fields: Fields) -> tuple[str, ...]:
    """Strings that end a text."""
    value = fields.take("stop", (str, list), [])
    found = [value] if isinstance(value, str) else value
    if len(found) > MOST_STOPS or not all(isinstance(one, str) and one for one in found):
        raise Refusal(400, f"stop: use a string or at most {MOST_STOPS} strings, none of them empty.", "stop")
    with blaming("stop"):
        for one in found:
            check_characters(one, "stop")
    return tuple(found)


def end_ids(fields: Fields, end_id: int, vocab_size: int) -> frozenset[int]:
    """Tokens that end a text: the model's own, unless it is to be ignored, and those of the client.

    Args:
      fields: of the request.
      end_id: the model's own end token.
      vocab_size: ids are below it.
    """
    name = "stop_token_ids"
    found = fields.take(name, list, [])
    if not all(is_id(one) and 0 <= one < vocab_size for one in found):
        raise Refusal(400, f"{name}: use a list of token ids, 0 to {vocab_size - 1}.", name)
    own = [] if fields.take("ignore_eos", bool, False) else [end_id]
    return frozenset([*own, *found])


def include_usage(fields: Fields, stream: bool) -> bool:
    """Whether a stream ends with the count of its tokens."""
    options = fields.take("stream_options", dict, {})
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    if asked and not (stream and list(asked) == ["include_usage"] and asked["include_usage"] is True):
        raise Refusal(
            400, "stream_options: only include_usage is known, and only with stream.", "stream_options"
        )
    return bool(asked)
