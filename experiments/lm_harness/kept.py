"""What a model's context has room for, of all that a task asks."""

import dataclasses


@dataclasses.dataclass
class Kept:
    """How many prompts were asked, of how many tokens, and what was cut from their left ends.

    Attributes:
      prompts, tokens: all of them.
      cut, lost: prompts that lost tokens, and those tokens.

    Example:
      >>> kept = Kept()
      >>> kept.add(tokens=10, room=8)
      >>> kept.said
      '1 of 1 prompts lost their left end, 2 of 10 tokens (20.00%), as the context has no room for them'
    """

    prompts: int = 0
    tokens: int = 0
    cut: int = 0
    lost: int = 0

    def add(self, tokens: int, room: int) -> None:
        """One more prompt, of which `room` tokens are kept."""
        lost = max(0, tokens - room)
        self.prompts, self.tokens = self.prompts + 1, self.tokens + tokens
        self.cut, self.lost = self.cut + (lost > 0), self.lost + lost

    @property
    def said(self) -> str:
        """What a user should know of it."""
        share = self.lost / max(1, self.tokens)
        return (
            f"{self.cut:,} of {self.prompts:,} prompts lost their left end, {self.lost:,} of {self.tokens:,} "
            f"tokens ({share:.2%}), as the context has no room for them"
        )
