"""What a batch is asked for, what it answers, and which prompts are read together."""

import dataclasses
from typing import NamedTuple

from tree_ffn.errors import InputError, NotFinite, check_positive_int
from tree_ffn.inference import decode
from tree_ffn.inference.penalties import Penalties
from tree_ffn.inference.sampling import Sampling
from tree_ffn.inference.scoring import TokenScores
from tree_ffn.models.spec import ModelSpec

# Scores of prompts that are held at once, B C V: 256 MiB in float32.
MOST_SCORES = 2**26


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A sequence to continue, to score, or both.

    Attributes:
      prompt: token ids, at least one.
      n_tokens: tokens to make; 0 only with `scored`.
      sampling: how they are chosen.
      seed: the same seed gives the same tokens, whatever else the batch holds;
        its last 32 bits count.
      scored: the log-probabilities of the prompt's own tokens are wanted.
      n_top: those of the new tokens are wanted, and at every position those of
        this many likeliest ones; None: new tokens are not scored.
      penalties: what changes the scores before a token is chosen; those that are told are the model's own.
    """

    prompt: tuple[int, ...]
    n_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    scored: bool = False
    n_top: int | None = None
    penalties: Penalties = Penalties()

    def check(self, spec: ModelSpec) -> None:
        """Raises InputError where a model cannot do it."""
        check_positive_int("seed", self.seed, least=0)
        check_positive_int("tokens", self.n_tokens, least=0 if self.scored else 1)
        decode.check_tokens(spec, self.prompt, self.n_tokens)
        for token, _ in self.penalties.logit_bias:
            if token >= spec.vocab_size:
                raise InputError(f"logit_bias: token {token} is not allowed; use 0 to {spec.vocab_size - 1}.")
        if self.n_top is not None:
            check_positive_int("n_top", self.n_top, least=0)


class Made(NamedTuple):
    """What one step did for a request.

    Attributes:
      request: which one.
      token: the new token; None if it asked for none.
      scores: of the new token, `TokenScores` without leading axes; None unless `n_top` is set.
      prompt: of the prompt's tokens from the second on, `TokenScores` of [C - 1];
        only with `scored`, in the request's first step.
      last: it has all its tokens, or failed.
      failed: why it gets no more: the model's scores were NaN or infinite. Other requests go on.
    """

    request: Request
    token: int | None
    scores: TokenScores | None
    prompt: TokenScores | None
    last: bool
    failed: NotFinite | None = None

    def checked(self) -> "Made":
        """Itself; raises NotFinite if the request failed."""
        if self.failed:
            raise self.failed
        return self


def program_of(spec: ModelSpec, request: Request) -> tuple[int, int | None]:
    """What prompts have in common that are read together.

    Returns:
      the rounded length, and how many alternatives the prompt's scores come
      with (None: it is not scored).

    Example:
      >>> from tree_ffn.models.dense import DenseSpec
      >>> spec = ModelSpec(vocab_size=9, max_seq_len=24, width=4, n_layers=1, n_heads=1, ffns=(DenseSpec(8),))
      >>> program_of(spec, Request((1,) * 7, 1)), program_of(spec, Request((1,) * 20, 1, scored=True))
      ((16, None), (24, 1))
    """
    length = min(decode.power_of_two(len(request.prompt)), spec.max_seq_len)
    return length, rounded_top(spec, request.n_top or 1) if request.scored else None


def rounded_top(spec: ModelSpec, n_top: int) -> int:
    """Alternatives that are computed where `n_top` are wanted: few values, few programs."""
    return min(decode.power_of_two(n_top, 1), spec.vocab_size)


def read_together(spec: ModelSpec, requests: list[Request]) -> list[list[Request]]:
    """Requests in groups of one program each, no larger than the scores of their prompts allow."""
    groups: dict[tuple, list[Request]] = {}
    for one in requests:
        groups.setdefault(program_of(spec, one), []).append(one)
    found = []
    for (length, n_top), same in groups.items():
        most = len(same)
        if n_top is not None:
            room = max(1, MOST_SCORES // (length * spec.vocab_size))
            most = 1 << (room.bit_length() - 1)  # groups are filled up to a power of two
        found += [same[i : i + most] for i in range(0, len(same), most)]
    return found
