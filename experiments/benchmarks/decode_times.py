"""Text made by the models of configs, token by token, timed in turns."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.inference import decode
from tree_ffn.inference.sampling import Sampling, rules
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.models.transformer import Transformer

_advance = jax.jit(decode.advance, static_argnames=("spec",), donate_argnames=("cache",))


class Decoding:
    """B texts of one model of random weights that grow together, one token after another.

    Args:
      config: as for training; its data are not read.
      vocab_size: V.
      batch: B.
      context: tokens that each text has before.
      n_tokens: tokens that a turn makes.
    """

    def __init__(self, config, vocab_size: int, batch: int, context: int, n_tokens: int):
        self.config, self.model, self.n_tokens = config, model_spec_from_config(config, vocab_size), n_tokens
        decode.check_tokens(self.model, [0] * context, n_tokens)
        self._shape, self._times = (batch, context), list[float]()
        self._rules = rules([Sampling()] * batch)

    def compile(self) -> None:
        """Random weights and an empty cache; the step runs once."""
        init = jax.jit(lambda key: Transformer(self.model).init(key, jnp.zeros((1, 1), jnp.int32)))
        self._spec, self._variables = decode.for_decoding(self.model, init(jax.random.key(0)))
        batch, context = self._shape
        room = decode.power_of_two(context + self.n_tokens)
        self._cache = decode.init_cache(self._spec, batch, room)._replace(length=jnp.full(batch, context))
        self._token_B = np.zeros(batch, np.int32)
        self._key_B = jax.random.split(jax.random.key(1), batch)
        self._step()

    def _step(self) -> None:
        self._token_B, scores_BV, self._cache, _ = _advance(
            self._variables, self._cache, self._token_B, self._key_B, self._rules, spec=self._spec
        )
        jax.block_until_ready((self._token_B, scores_BV))

    def turn(self, _: int) -> None:
        """The texts grow by `n_tokens`, each drawn at random; the time of a token is kept."""
        self._cache = self._cache._replace(length=jnp.full(self._shape[0], self._shape[1]))
        start = time.perf_counter()
        for _ in range(self.n_tokens):
            self._step()
        self._times.append((time.perf_counter() - start) / self.n_tokens)

    def seconds(self) -> float:
        """Median of a token of every text."""
        return statistics.median(self._times)

    def figures(self, first: "Decoding") -> dict[str, float]:
        """time_ms, tokens_per_s of all texts, ratio_to_first."""
        return {
            "time_ms": 1e3 * self.seconds(),
            "tokens_per_s": self._shape[0] / self.seconds(),
            "ratio_to_first": first.seconds() / self.seconds(),
        }
