"""The fields of a request's body: taken one by one, and what is left is refused by name."""

import reprlib
from typing import Any

from experiments.serving.refusal import Refusal

MOST_INT = 2**31 - 1
NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
         dict: "an object"}  # fmt: skip
# Fields of OpenAI's and vLLM's clients that are not done here, and their values (beside null) without effect.
NEUTRAL: dict[str, tuple] = {
    "add_generation_prompt": (True,), "add_special_tokens": (True,), "allowed_token_ids": (), "audio": (),
    "bad_words": ([],),
    "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,),
    "detokenize": (True,), "documents": ([],), "early_stopping": (False,), "echo": (False,),
    "function_call": ("auto", "none"), "functions": ([],),
    "guided_choice": (), "guided_grammar": (), "guided_json": (), "guided_regex": (),
    "include_stop_str_in_output": (False,), "length_penalty": (1,), "min_tokens": (0,),
    "modalities": (["text"],), "parallel_tool_calls": (False, True), "prediction": (), "priority": (0,),
    "prompt_embeds": (), "prompt_logprobs": (), "reasoning_effort": (),
    "response_format": ({"type": "text"},), "return_token_ids": (False,), "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "store": (False,),
    "structured_outputs": (), "suffix": ("",),
    "tool_choice": ("auto", "none"), "tools": ([],), "use_beam_search": (False,),
}  # fmt: skip
# Fields of those clients that change no answer, whatever they hold.
LABELS = ("metadata", "prompt_cache_key", "request_id", "safety_identifier", "user")


class Fields:
    """The fields of a body that nobody has read yet.

    Args:
      body: JSON value.

    Raises:
      Refusal: the body is no object.
    """

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise Refusal(400, "The body must be a JSON object.")
        self._left = dict(body)

    def take(self, name: str, types, default) -> Any:
        """A field of one of some types; null is as good as absent.

        Args:
          name: of the field.
          types: one or several.
          default: value of an absent field.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            wanted = " or ".join(NAMES[one] for one in (types if isinstance(types, tuple) else (types,)))
            raise Refusal(400, f"{name}: {shown(value)} is not allowed; use {wanted}.", name)
        return value

    def number(self, name: str, kind: type, default, least, most) -> Any:
        """A field with a number from `least` to `most`.

        Args:
          name: of the field.
          kind: int or float.
          default: value of an absent field.
          least: the smallest allowed.
          most: the largest allowed.
        """
        value = self.take(name, kind if kind is int else (int, float), default)
        if value is not None and value is not default and not least <= value <= most:
            to = f"from {least} to {most}"
            raise Refusal(400, f"{name}: {shown(value)} is not allowed; use a number {to}.", name)
        return value

    def finish(self) -> None:
        """Raises Refusal for a field that nobody knows or that cannot be done."""
        for name, value in self._left.items():
            if name in LABELS:
                continue
            if name not in NEUTRAL:
                raise Refusal(400, f"{shown(name)} is not a known field.", name[:100])
            if value is not None and not any(_same(value, one) for one in NEUTRAL[name]):
                raise Refusal(400, f"{name}: {shown(value)} is not supported; leave it out.", name)


def _same(value, other) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# Bounds the depth too: `repr` alone recurses.
_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel, _BOUNDED.maxstring, _BOUNDED.maxlong = 4, 200, 200


def shown(value) -> str:
    """A value as it may stand in a sentence.

    Example:
      >>> shown("a" * 99)
      "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    text = _BOUNDED.repr(value)
    return text if len(text) <= 43 else text[:40] + "..."


def is_id(value) -> bool:
    """Whether a JSON value may be a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_INT
