"""OpenAI's form of a chat, /v1/chat/completions: messages in, a message out, whole or piece by piece."""

import re
from typing import Any

from experiments.common.loaded import Loaded
from experiments.serving.answer import Envelope
from experiments.serving.chat_template import ChatTemplate
from experiments.serving.completion import Completion, assembled, check_model, most_prompt
from experiments.serving.fields import MOST_INT, Fields, shown
from experiments.serving.refusal import Refusal, blaming
from tree_ffn.json_input import check_characters

MOST_TOP = 20
# A token that is a part of a character, and one that is no text.
_BYTES, _NO_TEXT = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)"), re.compile(r"token_id:\d+")


def parse(body: Any, model: Loaded, template: ChatTemplate | None, name: str, most: int) -> Completion:
    """Checks the body of a request; arguments as of `completion.parse`.

    Args:
      template: of the model's tokenizer.

    Raises:
      Refusal: names the field, the value and what is allowed; or there is no template.
    """
    fields = Fields(body)
    check_model(fields, name)
    if template is None:
        raise Refusal(400, "messages: this model has no chat template; use /v1/completions.", "messages")
    text = template.text(_messages(fields.take("messages", list, [])))
    with blaming("messages"):
        check_characters(text, "messages: the text")
    ids = tuple(model.tokenizer.encode_marked(text).tolist())
    if not ids:
        raise Refusal(400, "messages: the chat template makes no text of them.", "messages")
    older = fields.number("max_tokens", int, None, 1, MOST_INT)
    n_tokens = fields.number("max_completion_tokens", int, older, 1, MOST_INT)
    if (most_read := most_prompt(fields, model, n_tokens or 1)) is not None:
        ids = ids[-most_read:]
    room = max(1, model.spec.max_seq_len - len(ids))
    return assembled(fields, model, most, [(ids, "")], n_tokens or room, _n_top(fields))


def _n_top(fields: Fields) -> int | None:
    """How many likely tokens come with each new one; None: no log-probabilities."""
    wanted = fields.take("logprobs", bool, False)
    n_top = fields.number("top_logprobs", int, None, 0, MOST_TOP)
    if n_top and not wanted:
        raise Refusal(400, "top_logprobs: it needs logprobs to be true.", "top_logprobs")
    return (n_top or 0) if wanted else None


def _messages(messages: list) -> list[dict[str, str]]:
    if not messages:
        raise Refusal(400, "messages: use a list of messages, not empty.", "messages")
    return [_message(one, f"messages: message {i + 1}") for i, one in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(400, f"{where} is not allowed; use an object with role and content.", "messages")
    known = {"role", "content", "name"}
    if unknown := [name for name, value in message.items() if name not in known and value not in (None, [])]:
        raise Refusal(400, f"{where} has {shown(unknown[0])}, which is not supported.", "messages")
    content, kept = message.get("content"), {"role": message["role"]}
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refusal(400, f"{where} has a content that is no text; only text is supported.", "messages")
    if (name := message.get("name")) is not None:
        if not isinstance(name, str):
            raise Refusal(400, f"{where} has the name {shown(name)}; use a string.", "messages")
        kept["name"] = name
    return kept | {"content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class ChatEnvelope(Envelope):
    """What stands around the message.

    Args:
      name: of the model.
      n_top: likely tokens that are told with each new one, if any are.
    """

    prefix, whole_name, part_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, name: str, n_top: int | None):
        super().__init__(name)
        self._n_top = n_top

    def choice(self, piece: dict) -> dict:
        message = {"role": "assistant", "content": piece["text"], "refusal": None}
        return {"index": piece["index"], "message": message, **self._rest(piece)}

    def opening(self, n: int) -> list[dict]:
        """Who speaks, for each of n messages."""
        delta = {"role": "assistant", "content": ""}
        return [self.part([self._delta(i, delta)]) for i in range(n)]

    def parts(self, piece: dict) -> list[dict]:
        """New text, and why a message ended: one by one."""
        found, index = [], piece["index"]
        if piece["text"] or (piece["logprobs"] and piece["logprobs"]["tokens"]):
            rest = self._rest(piece) | {"finish_reason": None}
            found.append(self.part([self._delta(index, {"content": piece["text"]}) | rest]))
        if piece["finish_reason"]:
            found.append(self.part([self._delta(index, {}) | {"finish_reason": piece["finish_reason"]}]))
        return found

    def _rest(self, piece: dict) -> dict:
        lists = piece["logprobs"]
        told = lists and {
            "content": [
                # The token itself may follow the likely ones.
                _token(token, log_p)
                | {"top_logprobs": [_token(*one) for one in list(top.items())[: self._n_top]]}
                for token, log_p, top in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"])
            ],
            "refusal": None,
        }
        return {"logprobs": told, "finish_reason": piece["finish_reason"]}

    @staticmethod
    def _delta(index: int, delta: dict) -> dict:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _token(written: str, log_p: float) -> dict:
    content = list(written.encode())
    if half := _BYTES.fullmatch(written):
        content = list(bytes.fromhex(half[1].replace("\\x", "")))
    return {"token": written, "logprob": log_p, "bytes": None if _NO_TEXT.fullmatch(written) else content}
