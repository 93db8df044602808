"""What a client gets: text, log-probabilities and why it ended, piece by piece or as a whole."""

import time
import uuid
from collections.abc import Iterable

from experiments.serving.completion import Completion
from tree_ffn.data.tokenizers import Tokenizer
from tree_ffn.inference.batching import Made
from tree_ffn.inference.detokenize import Characters, TextStream
from tree_ffn.inference.scoring import TokenScores

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Choice:
    """One sequence of the answer.

    Args:
      asked: the client's request.
      index: of the sequence.
      tokenizer: of the model.

    Attributes:
      n_made: tokens that were made.
      finished: whether nothing more comes.
    """

    def __init__(self, asked: Completion, index: int, tokenizer: Tokenizer):
        self._asked, self._index, self._tokenizer = asked, index, tokenizer
        self._ids, self._echoed = asked.prompts[index // asked.n]
        self._text = TextStream(tokenizer, asked.stops, self._ids, asked.end_ids)
        self._n_sent = 0
        self._entries: list[tuple] = []  # of made tokens, not yet sent: rows of LISTS
        self._begun = False
        self.n_made, self.finished = 0, False

    def push(self, made: Made) -> dict:
        """The next piece, in the form of an element of `choices`."""
        echoed, ready = ("", []) if self._begun else self._echo(made.prompt)
        self._begun = True
        self._n_sent += len(echoed)
        new, ended = "", False
        if made.token is not None:
            self.n_made += 1
            ended = made.token in self._asked.end_ids
            if made.scores is not None:
                self._entries.append(
                    self._entry(made.token, made.scores, self._n_sent + self._text.n_held, self._text.before)
                )
            new = self._text.push(made.token)
        stopped = self._text.stopped
        if made.last and not stopped:
            new += self._text.rest()
        self._n_sent += len(new)
        self.finished = stopped or made.last
        # Tokens behind a stop string are never sent, and those whose text is held back not yet.
        n_ready = len(self._entries)
        if not ended and (stopped or not made.last):
            n_ready = sum(one[3] < self._n_sent for one in self._entries)
        ready += self._entries[:n_ready]
        self._entries = self._entries[n_ready:]
        return {
            "text": echoed + new,
            "index": self._index,
            "logprobs": None if self._asked.logprobs is None else _lists(ready),
            "finish_reason": ("stop" if stopped else "length") if self.finished else None,
        }

    def _echo(self, scores: TokenScores | None) -> tuple[str, list[tuple]]:
        """The prompt's text and the entries of its tokens: nothing says how likely the first one is."""
        if not self._asked.echo:
            return "", []
        if self._asked.logprobs is None or scores is None:
            return self._echoed, []
        characters, entries = Characters(self._tokenizer), []
        # Some tokenizers put a space before the text: it is none of the client's.
        read = self._tokenizer.decode(self._ids)
        offset = len(self._echoed) - len(read) if read.endswith(self._echoed) else 0
        for i, token in enumerate(self._ids):
            before, place = characters.before, max(0, offset)
            known = (self._written(token, before), None, None, place)
            entries.append(self._entry(token, scores.at(i - 1), place, before) if i else known)
            offset = min(offset + len(characters.push(token)), len(self._echoed))
        return self._echoed, entries

    def _entry(self, token: int, scores: TokenScores, offset: int, before: int | None) -> tuple:
        top: dict[str, float] = {}
        for other, log_p in zip(scores.top_ids.tolist(), scores.top_log_p):
            written = self._written(other, before)
            # Two tokens may give the same text: the likelier one has the name.
            top[f"token_id:{other}" if written in top else written] = float(log_p)
        written, own = self._written(token, before), float(scores.log_p)
        if self._asked.logprobs:
            top.setdefault(written, own)
        return written, own, top, offset

    def _written(self, token: int, before: int | None) -> str:
        """What a token adds to the text behind another; a part of a character as OpenAI writes it."""
        if token == self._tokenizer.end_id:
            return self._tokenizer.end_token
        if not self._tokenizer.is_text(token):
            return f"token_id:{token}"
        piece = self._tokenizer.piece(token, before)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _lists(entries: list[tuple]) -> dict:
    return {name: [entry[i] for entry in entries] for i, name in enumerate(LISTS)}


def joined(pieces: Iterable[dict]) -> dict:
    """The pieces of one choice as one."""
    first, *others = pieces
    whole = dict(first)
    for piece in others:
        whole["text"] += piece["text"]
        whole["finish_reason"] = piece["finish_reason"]
        if whole["logprobs"] is not None:
            whole["logprobs"] = {name: whole["logprobs"][name] + piece["logprobs"][name] for name in LISTS}
    return whole


class Envelope:
    """What stands around the choices: the same for every piece of an answer.

    Args:
      name: of the model.
    """

    prefix, whole_name, part_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, name: str):
        self._id, self._created, self._name = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), name

    def _around(self, kind: str, choices: list[dict]) -> dict:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._name}
        return head | {"choices": choices}

    def whole(self, pieces: list[dict], usage: dict) -> dict:
        """An answer; the pieces are whole too."""
        return self._around(self.whole_name, [self.choice(one) for one in pieces]) | {"usage": usage}

    def part(self, choices: list[dict]) -> dict:
        """A piece of an answer."""
        return self._around(self.part_name, choices)

    def choice(self, piece: dict) -> dict:
        """A whole piece as an element of `choices`."""
        return piece

    def opening(self, n: int) -> list[dict]:
        """Pieces that come before those of n choices."""
        return []

    def parts(self, piece: dict) -> list[dict]:
        """The pieces of the answer that tell a piece of a choice; none if it says nothing."""
        listed = piece["logprobs"] and piece["logprobs"]["tokens"]
        return [self.part([piece])] if piece["text"] or listed or piece["finish_reason"] else []


def usage(asked: Completion, choices: list[Choice]) -> dict:
    """Tokens read and made."""
    n_read = sum(len(ids) for ids, _ in asked.prompts)
    n_made = sum(one.n_made for one in choices)
    return {"prompt_tokens": n_read, "completion_tokens": n_made, "total_tokens": n_read + n_made}
