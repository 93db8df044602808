"""Training steps of configs, timed in turns: what experiments/benchmark_models.py reports."""

import functools
import os
import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common.config_words import config_of, words_of
from experiments.sweeps.sweep import read_sweep
from tree_ffn.errors import InputError, check_choice
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.paths import local
from tree_ffn.training import optimizer, sharding, step
from tree_ffn.training.plan import check_trainable, optim_spec, train_spec


def load_config(name: str) -> ConfigDict:
    """The config of FILE:argument, or of a row of a sweep, SWEEP:argument#ROW.

    Raises:
      InputError: there is no such file or row, or it does not know the argument.
    """
    name = local(name, "--run")
    file, is_row, row = name.partition("#")
    path = file.partition(":")[0]
    if not (path.endswith(".py") and os.path.isfile(path)):
        raise InputError(f"--run: {path!r} is no config file; use e.g. configs/quickstart.py.")
    if not is_row:
        return config_of([f"--run={name}"], flag="run")
    data = read_sweep(file)
    check_choice(f"--run: row of {file}", row, tuple(data.get("rows", ())))
    values = data.get("set", {}) | data["rows"][row].get("set", {})
    return config_of(words_of(data["config"], values))


class Steps:
    """The training step of one config, with visits counted and without.

    Args:
      config: as for training; its data are not read.
      vocab_size: V.
      mesh: where it runs.
      in_start: a step in the dense start, of layers that have one; else after it.
    """

    def __init__(self, config, vocab_size: int, mesh, in_start: bool = False):
        self.config, self.mesh = config, mesh
        model = model_spec_from_config(config, vocab_size)
        self.model = model if in_start else model.after_start
        train, optim = train_spec(config), optim_spec(config)
        check_trainable(self.model, optim)
        train.fit(mesh)
        self.shape = (train.batch_size, self.model.max_seq_len + 1)
        self._optimizer = optimizer.make_optimizer(optim)
        run = functools.partial(
            step.train_step, model=self.model, optimizer=self._optimizer,
            schedule=optimizer.learning_rate(optim), accumulation=train.grad_accum_steps,
            sync=train.grad_sync,
            steps=train.steps,
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
        batch = jax.block_until_ready(self._batch())
        start = time.perf_counter()
        program = self._step if counted else self._plain
        self._state, self._usage, metrics = program(self._state, self._usage, batch)
        jax.block_until_ready((self._state, metrics))
        self._times[counted].append(time.perf_counter() - start)

    def _batch(self) -> jax.Array:
        tokens = self.model.vocab_size ** self._rng.random(self.shape) - 1
        return sharding.put_batch(tokens.astype(np.int32), self.mesh)

    def turn(self, n: int) -> None:
        """A step with visits counted and one without. Which goes first changes: neither always meets the
        other's caches."""
        for counted in (n % 2 == 0, n % 2 == 1):
            self.run(counted)

    def seconds(self) -> float:
        """Median of a step as in training."""
        return statistics.median(self._times[True])

    def say_memory(self) -> dict[str, float]:
        """Prints and returns the GB that a step needs on a device by its compiler, as `plan` says it, and the
        most that was in use of one: by the whole process, and where devices say it."""
        in_use = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self.mesh.devices.flat]
        with jax.set_mesh(self.mesh):
            said = self._step.lower(self._state, self._usage, self._batch()).compile().memory_analysis()
        assert said is not None, "this backend tells nothing of its programs"
        planned = (said.argument_size_in_bytes + said.temp_size_in_bytes) / 1e9
        if None in in_use:
            print(
                f"memory: {planned:.3f} GB a device by the compiler; these devices do not say what is in use"
            )
            return {"planned_gb": planned}
        peak = max(in_use) / 1e9
        off = planned / peak - 1
        print(f"memory: {planned:.3f} GB a device by the compiler, {peak:.3f} GB in use at most ({off:+.1%})")
        return {"planned_gb": planned, "peak_gb": peak}

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
