"""What layers have in common that begin a training in part dense."""

import dataclasses

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaking:
    """How much of themselves units out of use add while a training is young: the base of such layers' specs.

    Attributes:
      leak: of training from scratch: what a unit that a token does not use (off its path, of an expert it
        did not choose) adds at first, as a share of what it would add whole. It falls in equal steps to 0
        (see `leak_at`), and is 0 in every validation.
      leak_share: share of the training after which nothing leaks.

    Raises:
      InputError: names the field, its value and what is allowed.
    """

    leak: float = 0.0
    leak_share: float = 0.3

    def __post_init__(self):
        check_number("leak", self.leak)
        check_number("leak_share", self.leak_share)
        if not 0 <= self.leak <= 1:
            raise InputError(f"leak: {self.leak!r} is not allowed; use a number from 0 to 1.")
        if not 0 < self.leak_share <= 1:
            raise InputError(
                f"leak_share: {self.leak_share!r} is not allowed; use a number above 0, at most 1."
            )

    def leak_at(self, done: jax.Array) -> jax.Array:
        """What units out of use add when a share `done` of the training is over: a float32 scalar.

            leak_at(d) = leak max(0, 1 - d / leak_share)

        Example:
          >>> spec = Leaking(leak=0.2, leak_share=0.5)
          >>> [round(float(spec.leak_at(done)), 2) for done in (0.0, 0.25, 0.5, 1.0)]
          [0.2, 0.1, 0.0, 0.0]
        """
        return self.leak * jnp.maximum(0.0, 1.0 - jnp.asarray(done, jnp.float32) / self.leak_share)
