"""Clocks: chains of layers that take turns, each call with tokens of its own; what a machine does at best."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import energy


class Work(Protocol):
    """What a chain is made for: layers of some width, a number of tokens, a pass, a dtype."""

    n_tokens: int
    width: int
    direction: str
    dtype: str

    def layers(self) -> int: ...

    def passes(self) -> int: ...


class Variant(NamedTuple):
    """A layer to time: `init(key)` gives its weights, `apply(weights, x)` its output.

    Attributes:
      name: as results call it.
      init: weights of a random key.
      apply: the layer.
      eager: it is NumPy's, and not compiled.
    """

    name: str
    init: Callable
    apply: Callable
    eager: bool = False


class Timed:
    """A chain of layers of one variant, and its times. `layers` counts all calls of one in a chain."""

    def __init__(self, work: Work, variant: Variant, key):
        self.name, self.layers, self.eager = variant.name, work.layers() * work.passes(), variant.eager
        self.n_tokens = work.n_tokens
        self.weights = list(map(jax.jit(variant.init), jax.random.split(key, work.layers())))
        chain = chained(variant.apply, self.layers)
        if work.direction != "forward":
            chain = with_gradients(chain)
        self.run: Any
        if variant.eager:
            self.weights, self.run = jax.tree.map(np.asarray, self.weights), chain
        else:
            abstract = jax.ShapeDtypeStruct((self.layers + 1, work.n_tokens, work.width), work.dtype)
            self.run = jax.jit(chain).lower(self.weights, abstract).compile()
        self.times: list[float] = []
        self.joules: float | None = None  # of a token in one layer

    def memory(self) -> int | None:
        """Bytes of arguments, results and temporaries of one layer's call; None where no compiler tells."""
        if self.eager:
            return None
        stats = self.run.memory_analysis()
        assert stats is not None, "this backend reports no memory"
        parts = (stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes)
        return sum(parts) // len(self.weights)

    def measure(self, inputs: list) -> None:
        """Calls the chain once with each input; the mean time of a call of one layer is kept."""
        inputs = list(map(np.asarray, inputs)) if self.eager else inputs
        start = time.perf_counter()
        for x_NTE in inputs:
            out = self.run(self.weights, x_NTE)
        jax.block_until_ready(out)
        self.times.append((time.perf_counter() - start) / len(inputs) / self.layers)

    def draw(self, x_NTE, joules: Callable[[], float], seconds: float = 2.0) -> None:
        """Notes the energy of a token in one layer, with one input again and again.

        Args:
          x_NTE: the input.
          joules: of `energy.counter`.
          seconds: how long.
        """
        call = energy.per_call(lambda: self.run(self.weights, x_NTE), joules, seconds)
        self.joules = call / self.layers / self.n_tokens

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def chained(apply, layers: int):
    """The chain's output from inputs [layers + 1, T, E]; the last of them is for `with_gradients`.

    Where there are fewer weights than layers, they come again and again.
    """

    def run(weights, x_NTE):
        y = x_NTE[0] * 0
        for layer in range(layers):
            # A whiff of the last output keeps the layers in sequence.
            y = apply(weights[layer % len(weights)], x_NTE[layer] + np.asarray(1e-3, y.dtype) * y)
        return y

    return run


def with_gradients(chain):
    """Output and gradients of weights and inputs; the last input is the output's cotangent.

    With a constant cotangent, and the output thrown away, a compiler may leave out what a model needs.
    """

    def run(weights, x_NTE):
        y_TE, vjp = jax.vjp(chain, weights, x_NTE)
        return y_TE, vjp(x_NTE[-1])

    return run


def time_all(work: Work, timed: list[Timed], seconds: float, key, rounds: int = 1000) -> None:
    """Times the variants in turns until each had its seconds: at least 3 rounds, at most `rounds`.

    No tokens are used twice: those of a token that came before would find its experts in the caches.

    Args:
      work: sizes of the inputs.
      timed: the variants; their times are appended to.
      seconds: of each variant.
      key: of the inputs.
      rounds: at most.
    """
    timed = sorted(timed, key=lambda t: t.eager)  # OpenBLAS's threads spin for a while after their work
    repeats: dict[Timed, int] = {}
    for t in timed:  # the first call also warms up
        first, *second = inputs(work, key, t.layers, 2)
        t.measure([first])
        t.measure(second)
        repeats[t] = max(1, min(50, int(0.02 / (t.times[-1] * t.layers))))
        t.times.clear()
    spent = dict.fromkeys(repeats, 0.0)
    for index in range(rounds):
        if index >= 3 and all(s >= seconds for s in spent.values()):
            break
        fresh = inputs(work, jax.random.fold_in(key, index), timed[0].layers, max(repeats.values()))
        for t in timed:
            if index < 3 or spent[t] < seconds:
                t.measure(fresh[: repeats[t]])
                spent[t] += t.times[-1] * t.layers * repeats[t]


_draw = jax.jit(jax.random.normal, static_argnums=(1, 2))


def inputs(work: Work, key, layers: int, n: int) -> list:
    """Tokens [layers + 1, T, E] of n calls.

    Args:
      work: sizes of the inputs.
      key: a new one gives new tokens.
      layers: that run one after the other.
      n: number of calls.
    """
    shape = (layers + 1, work.n_tokens, work.width)
    return jax.block_until_ready([_draw(k, shape, work.dtype) for k in jax.random.split(key, n)])


def take_turns(timed: list, seconds: float) -> None:
    """Calls `turn(n)` of each, n = 0, 1, ..., until all have had their time, three times at least."""
    start, n = time.perf_counter(), 0
    while n < 3 or time.perf_counter() - start < seconds * len(timed):
        for one in timed:
            one.turn(n)
        n += 1


@functools.cache
def ceilings(dtype: str) -> tuple[float, float]:
    """Bytes/s of a large copy (read + write) and operations/s of a large matrix product."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**29
    big = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(dtype)
    product = jax.jit(lambda a: a @ a)

    def best(f, a):
        jax.block_until_ready(f(a))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(f(a))
            times.append(time.perf_counter() - start)
        return min(times)

    return 8 * size / best(copy, big), 2 * side**3 / best(product, square)
