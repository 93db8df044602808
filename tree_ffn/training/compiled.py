"""What runs on devices: jit with shardings around the pure functions of `step`."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tree_ffn.models.spec import ModelSpec
from tree_ffn.training import optimizer, probe, sharding, step
from tree_ffn.training.plan import Plan


@functools.lru_cache(maxsize=32)
def bound(function: Callable, **static: Any) -> Callable:
    """functools.partial, one object for equal arguments: by it jax.jit knows what it has compiled."""
    return functools.partial(function, **static)


class Score(NamedTuple):
    """Loss over some batches.

    Attributes:
      loss: mean cross-entropy in nats a token.
      tokens: how many were predicted.
      usage: visit counts as `step.empty_usage`, NumPy arrays.
      leaves: leaves int32 [layers, T, P] of the first batch, one array a run.
    """

    loss: float
    tokens: int
    usage: tuple
    leaves: tuple


class Scorer:
    """Scores batches with a model; compiled once.

    Args:
      model: the model.
      mesh: where it runs.
      eval_step: another one than `step.eval_step`.

    Example:
      >>> score = Scorer(model, mesh)(variables, batches)         # doctest: +SKIP
      >>> score.loss, score.tokens                                # doctest: +SKIP
      (2.31, 81920)
    """

    def __init__(self, model: ModelSpec, mesh: Mesh, eval_step=step.eval_step):
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._mesh = mesh
        self._eval_step = jax.jit(
            bound(eval_step, model=model), donate_argnums=(1,), out_shardings=everywhere
        )
        self.empty_usage = jax.jit(bound(step.empty_usage, model=model), out_shardings=everywhere)

    def __call__(self, variables: dict, batches: Iterable[np.ndarray]) -> Score:
        """Score of `variables` over batches int32 [B, C + 1].

        A smaller batch is filled up with rows that do not count, to the largest size so far: every row
        weighs the same, however they are divided into batches.
        """
        losses, rows, usage, leaves, size, tokens = [], [], self.empty_usage(), (), 0, 0
        for batch in batches:
            # Two batches under way at most: a longer queue would hold their tokens on the devices, and on
            # a CPU that plays several devices, threads that wait for one program starve those of another.
            jax.block_until_ready(losses[-2:-1])
            filled = sharding.filled_up(batch, self._mesh, size)
            size, n = len(filled), len(batch)
            loss, usage, batch_leaves = self._eval_step(
                variables, usage, sharding.put_batch(filled, self._mesh), np.int32(n)
            )
            tokens += n * (batch.shape[1] - 1)
            if not losses:
                leaves = tuple(leaf[:, :tokens] for leaf in batch_leaves)
            losses.append(loss)
            rows.append(n)
        losses, usage, leaves = jax.device_get((losses, usage, leaves))
        return Score(float(np.average(np.asarray(losses, np.float64), weights=rows)), tokens, usage, leaves)


def _probe(plan: Plan):
    """`probe.probe` as a function (variables, batch int32 [B, C + 1]); None where off, or without trees."""
    if not (plan.train.probe and any(map(probe.can_probe, plan.model.ffns))):
        return None
    everywhere = NamedSharding(plan.mesh, PartitionSpec())
    compiled = jax.jit(bound(probe.probe, model=plan.model), out_shardings=everywhere)
    return lambda variables, batch: compiled(variables, sharding.put_batch(batch, plan.mesh))


class Programs(NamedTuple):
    """The compiled functions of a run, and the shapes and shardings of its state; `probe` may be None."""

    abstract: step.TrainState
    init: Any
    train_step: Any
    scorer: Scorer
    probe: Any


def compile_programs(plan: Plan) -> Programs:
    """jit with shardings of everything that runs on devices; compiled at first use, once for runs alike.

    State and counts are donated: a step writes over them.
    """
    optim = optimizer.make_optimizer(plan.optim)
    init = bound(step.init_state, model=plan.model, optimizer=optim)
    abstract = sharding.placed(jax.eval_shape(init, jax.random.key(plan.seed)), plan.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere, rows = NamedSharding(plan.mesh, PartitionSpec()), sharding.batch_sharding(plan.mesh)
    train_step = bound(
        step.train_step,
        model=plan.model,
        optimizer=optim,
        schedule=optimizer.learning_rate(plan.optim),
        accumulation=plan.train.grad_accum_steps,
        steps=plan.train.steps,
    )
    return Programs(
        abstract=abstract,
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, everywhere, rows),
            out_shardings=(shardings, everywhere, everywhere),
            donate_argnums=(0, 1),
        ),
        scorer=Scorer(plan.model, plan.mesh),
        probe=_probe(plan),
    )
