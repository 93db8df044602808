"""How a task of the evaluation harness wants its answers made, and what room a context leaves for them."""

from typing import NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from tree_ffn.errors import InputError, check_choice, check_number, check_positive_int, reason
from tree_ffn.inference.sampling import Sampling

MOST_NEW_TOKENS = 256  # of a task that names no number, as with the harness's own backends
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts
KNOWN = (*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "seed")
# Known to the harness's backends, and not done here: only these values mean nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "min_p": 0, "use_cache": True}


class Options(NamedTuple):
    """How answers are made.

    Attributes:
      n_tokens: tokens of an answer; None: the task names no number.
      sampling: how they are chosen.
      stops: what ends an answer; never empty strings.
      seed: of the random choices.
    """

    n_tokens: int | None
    sampling: Sampling
    stops: list[str]
    seed: int

    def room(self, prompt: int, context: int) -> int:
        """Tokens of an answer to a prompt of so many.

        A task's own number stands. Where it names none, an answer gets what a prompt leaves of the context,
        256 at most, and an eighth of the context at least: of 2,048 and more that is 256, as in the harness.

        Example:
          >>> options = read_options({}, context=128)
          >>> [options.room(prompt, 128) for prompt in (10, 100, 300)], options.room(10, 512)
          ([118, 28, 16], 256)
        """
        if self.n_tokens is not None:
            return self.n_tokens
        return min(MOST_NEW_TOKENS, max(context // 8, context - prompt, 1))


def read_options(given: dict, context: int) -> Options:
    """A task's generation_kwargs, by the harness's own rules for them.

    Args:
      given: `until`, `temperature` and so on; null is as good as absent.
      context: of the model.

    Raises:
      InputError: names the option that is not known or not allowed.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in KNOWN and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise InputError(f"generation_kwargs: {name}={value!r} is not supported; use {', '.join(KNOWN)}.")
    try:
        found = dict(normalize_gen_kwargs(given, MOST_NEW_TOKENS))
        sampling, stops = _sampling(found), [stop for stop in found["until"] if stop]
        if not all(isinstance(stop, str) for stop in stops):
            raise InputError("until is a text or several")
        check_positive_int("seed", seed := found.get("seed", 0), least=0)
    except (TypeError, ValueError, OverflowError) as error:  # InputError is a ValueError
        raise InputError(f"generation_kwargs: {given!r} is not allowed ({reason(error)}).") from None
    return Options(_length(given, found["max_gen_toks"], context), sampling, stops, seed)


def _sampling(found: dict) -> Sampling:
    """A temperature alone samples; one of 0 never does."""
    temperature, top_k = float(found.get("temperature", 1.0)), found.get("top_k", 0)
    check_number("temperature", temperature, least=0)
    check_choice("do_sample", found["do_sample"], (True, False))
    greedy = not found["do_sample"] or temperature == 0
    # -1 is another way to keep all.
    return Sampling(greedy, 1.0 if greedy else temperature, max(0, top_k), found.get("top_p", 1.0))


def _length(given: dict, n_tokens: int, context: int) -> int | None:
    """A task's own number, of which an eighth of the context is left for the question."""
    name, most = next((name for name in LENGTHS if name in given), None), context - max(1, context // 8)
    if name is not None and not 0 < n_tokens <= most:
        raise InputError(
            f"generation_kwargs: {name}={given[name]!r} leaves no room for a question in the model's "
            f"context of {context}; use 1 to {most}, or a model with a longer context."
        )
    return n_tokens if name else None
