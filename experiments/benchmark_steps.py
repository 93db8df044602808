"""Times whole training steps of several configs against each other, and what counting visits costs.

    python -m experiments.benchmark_steps --run=configs/t1_small.py:row=dense \
        --run=configs/t1_small.py:row=tree_hard_P1_W12 --vocab=50257
    python -m experiments.benchmark_steps --run=configs/quickstart.py --results=results/speed_steps.jsonl

Every config is compiled as training compiles it. Batches are of random tokens whose frequencies fall as those
of words do (Zipf): no text is read. The configs take turns, ratios are of medians in one run, to the first
config. `counting` is the share of a step that its visit counts take: the median of (with - without) / with.
"""

import functools
import importlib.util
import os
import statistics
import time

import jax
import numpy as np
from absl import flags

from experiments import cli, record
from tree_ffn.errors import InputError, check_positive_int
from tree_ffn.models.build import model_spec_from_config
from tree_ffn.training import optimizer, sharding, step
from tree_ffn.training.metrics import active_share
from tree_ffn.training.setup import check_trainable, optim_spec, train_spec

_RUNS = flags.DEFINE_multi_string("run", [], "A config, FILE:key=value,...; the first is what ratios are to.")
_VOCAB = flags.DEFINE_integer("vocab", 257, "Size of the vocabulary, e.g. 50257.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time to spend on every config.")
_RESULTS = flags.DEFINE_string("results", None, "Append rows of table speed_steps to this file.")


def main() -> None:
    if not _RUNS.value:
        raise InputError("--run is missing; name at least one config, e.g. --run=configs/quickstart.py.")
    check_positive_int("--vocab", _VOCAB.value, least=2)
    mesh = sharding.make_mesh(-1, 1)
    with jax.set_mesh(mesh):
        timed = {}
        for name in _RUNS.value:
            if name in timed:
                raise InputError(f"--run: {name!r} is given twice; give it once.")
            timed[name] = Steps(load_config(name), _VOCAB.value, mesh)
        for steps in timed.values():
            steps.compile()
        measure(list(timed.values()), _SECONDS.value)
    first = next(iter(timed.values()))
    print(f"{'ms a step':>10} {'tokens/s':>10} {'speed':>6} {'counting':>9} {'active':>7}")
    for name, steps in timed.items():
        figures = steps.figures(first)
        print(
            f"{figures['time_ms']:10.2f} {figures['tokens_per_s']:10,.0f} {figures['ratio_to_first']:6.2f} "
            f"{figures.get('counting', 0.0):9.2%} {active_share(steps.model):7.1%}  {name}"
        )
        if _RESULTS.value:
            write(name, steps, figures)


def load_config(name: str):
    """The config of FILE:argument.

    Raises:
      InputError: there is no such file, or it does not know the argument.
    """
    path, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    if not (os.path.isfile(path) and spec and spec.loader):
        raise InputError(f"--run: {path!r} is no config file; use e.g. configs/quickstart.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(argument)
    except ValueError as error:
        raise InputError(f"--run: {name}: {error}") from error


class Steps:
    """The training step of one config, with visits counted and without.

    Args:
      config: as for training; its data are not read.
      vocab_size: V.
      mesh: where it runs.
    """

    def __init__(self, config, vocab_size: int, mesh):
        self.config, self.mesh = config, mesh
        self.model = model_spec_from_config(config, vocab_size)
        check_trainable(self.model)
        train, optim = train_spec(config), optim_spec(config)
        train.fit(mesh)
        self.shape = (train.batch_size, self.model.context + 1)
        self._optimizer = optimizer.make_optimizer(optim)
        run = functools.partial(
            step.train_step, model=self.model, optimizer=self._optimizer,
            schedule=optimizer.learning_rate(optim), accumulation=train.accumulation, z_loss=train.z_loss,
        )  # fmt: skip
        self._step = jax.jit(run, donate_argnums=(0, 1))
        self._plain = jax.jit(functools.partial(run, count=False), donate_argnums=(0, 1))
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._rng = np.random.default_rng(0)

    def compile(self) -> None:
        """Initial state; both programs run once."""
        init = functools.partial(step.init_state, model=self.model, optimizer=self._optimizer)
        abstract = sharding.placed(jax.eval_shape(init, jax.random.key(0)), self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        self._usage = step.empty_usage(self.model)
        for counted in (True, False):
            self.run(counted)
            self._times[counted].clear()

    def run(self, counted: bool) -> None:
        """One step on a fresh batch; its time is kept."""
        tokens = self.model.vocab_size ** self._rng.random(self.shape) - 1
        batch = sharding.put_batch(tokens.astype(np.int32), self.mesh)
        jax.block_until_ready(batch)
        start = time.perf_counter()
        program = self._step if counted else self._plain
        self._state, self._usage, metrics = program(self._state, self._usage, batch)
        jax.block_until_ready((self._state, metrics))
        self._times[counted].append(time.perf_counter() - start)

    def seconds(self) -> float:
        """Median of a step as in training."""
        return statistics.median(self._times[True])

    def figures(self, first: "Steps") -> dict[str, float]:
        """time_ms, tokens_per_s, ratio_to_first, and counting where there is something to count."""
        rows, columns = self.shape
        values = {
            "time_ms": 1e3 * self.seconds(),
            "tokens_per_s": rows * (columns - 1) / self.seconds(),
            "ratio_to_first": first.seconds() / self.seconds(),
        }
        if any(counts is not None for counts in self._usage):
            pairs = zip(self._times[True], self._times[False])
            values["counting"] = statistics.median((a - b) / a for a, b in pairs)
        return values


def measure(timed: list[Steps], seconds: float) -> None:
    """Lets the configs take turns until each has had its time, three turns at least."""
    start = time.perf_counter()
    turns = 0
    while turns < 3 or time.perf_counter() - start < seconds * len(timed):
        for steps in timed:
            # Which of the two goes first changes: neither always meets the other's caches.
            for counted in (turns % 2 == 0, turns % 2 == 1):
                steps.run(counted)
        turns += 1


def write(name: str, steps: Steps, figures: dict[str, float]) -> None:
    """One row of table `speed_steps` for every figure; the row is called as the config's argument says."""
    path, _, argument = name.partition(":")
    row = "_".join(
        [os.path.splitext(os.path.basename(path))[0], *filter(None, [argument.replace("row=", "")])]
    )
    config = record.resolved(steps.config)
    config["data"] = {"corpus": "random", "vocab_size": steps.model.vocab_size}
    for metric, value in figures.items():
        record.append_result(
            _RESULTS.value, table="speed_steps", row=row.replace("=", "").replace(",", "_"), metric=metric,
            value=value, unit={"time_ms": "ms", "tokens_per_s": "tokens/s"}.get(metric, "1"), seed=None,
            config=config,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
