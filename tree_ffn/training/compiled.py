"""What runs on devices: jit with shardings around the pure functions of `step`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tree_ffn.models.spec import ModelSpec
from tree_ffn.training import optimizer, probe, sharding, step
from tree_ffn.training.plan import Plan
from tree_ffn.tree.combine import fastest


@functools.lru_cache(maxsize=32)
def bound(function: Callable, **static: Any) -> Callable:
    """functools.partial, one object for equal arguments: by it jax.jit knows what it has compiled."""
    return functools.partial(function, **static)


def keep_compiled(directory: str) -> None:
    """From here on compiled programs are looked up and kept there; "" changes nothing."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # it looks once, and processes that have met have compiled


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


class Late(NamedTuple):
    """The training step once no layer starts dense any more: of the chosen experts alone.

    Attributes:
      first: the finished steps from which it takes the place of the other.
      train_step: the same function, executed otherwise.
    """

    first: int
    train_step: Any


class Programs(NamedTuple):
    """The compiled functions of a run, its state's shapes and shardings; `late` and `probe` may be None."""

    abstract: step.TrainState
    init: Any
    train_step: Any
    late: Late | None
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

    def train_step(model: ModelSpec):
        function = bound(
            step.train_step,
            model=model,
            optimizer=optim,
            schedule=optimizer.learning_rate(plan.optim),
            accumulation=plan.train.grad_accum_steps,
            sync=plan.train.grad_sync,
            steps=plan.train.steps,
        )
        return jax.jit(
            function,
            in_shardings=(shardings, everywhere, rows),
            out_shardings=(shardings, everywhere, everywhere),
            donate_argnums=(0, 1),
        )

    early, late = phases(plan)
    return Programs(
        abstract=abstract,
        init=jax.jit(init, out_shardings=shardings),
        train_step=train_step(early),
        late=late and Late(first_after_start(plan), train_step(late)),
        scorer=Scorer(plan.model, plan.mesh),
        probe=_probe(plan),
    )


def phases(plan: Plan) -> tuple[ModelSpec, ModelSpec | None]:
    """The model as it is trained from the first step on, and once dense starts are over.

    A dense start computes every expert, so `model.implementation` is followed after it. Where that is
    `masked` too, there is one phase: a second program would only have to be compiled.

    Args:
      plan: of the run.
    """
    model, over = plan.model, plan.model.after_start
    if not any(map(step.leaks, model.ffns)):
        return model, None
    early = dataclasses.replace(model, implementation=None)
    if len(over.runs) != len(model.runs):  # layers that differ in their starts alone are stored apart
        return early, None
    n_tokens = plan.train.microbatch * model.max_seq_len // plan.mesh.shape["data"]
    x_TE = jax.ShapeDtypeStruct((n_tokens, model.width), model.dtype)
    params = {"w_in": jax.ShapeDtypeStruct((), model.param_dtype)}
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):  # whose devices need not be here
        used = {
            model.implementation or fastest(params, x_TE, ffn.after_start, learns=True)
            for ffn in model.ffns
            if step.leaks(ffn)
        }
    return early, None if used == {"masked"} else over


def first_after_start(plan: Plan) -> int:
    """How many steps are finished when the first begins in which no layer leaks.

    Args:
      plan: of the run.
    """
    return math.ceil(max(ffn.dense_start for ffn in plan.model.ffns if step.leaks(ffn)) * plan.train.steps)
