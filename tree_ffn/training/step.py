"""One step of training and of validation: pure functions of state and batch.

Nothing here compiles, prints or reads a clock; `loop` does. A batch is int32
[B, C + 1]: the first C tokens are read, the last C are predicted.
"""

from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax

from tree_ffn.models.ffn import count_shape
from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.models.transformer import Transformer, update_model_routing
from tree_ffn.training.gradients import gradients
from tree_ffn.training.guards import SkipState
from tree_ffn.training.losses import next_token_loss, row_mean
from tree_ffn.tree import Info, LeafSpec, TreeSpec
from tree_ffn.tree.usage import visit_counts


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; all of it is in a checkpoint.

    Attributes:
      step: int32 scalar, finished steps.
      params: what the optimizer trains.
      routing: what only balancing changes: thresholds, frozen routers, the
        selection bias of leaf layers.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: dict
    routing: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What `Transformer.apply` takes."""
        return {"params": self.params, "routing": self.routing}


def init_state(key: jax.Array, model: ModelSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0; under `jax.eval_shape` its shapes.

    Args:
      key: random key of the weights.
      model: the model.
      optimizer: of `make_optimizer`.
    """
    tokens_BC = jnp.zeros((1, model.max_seq_len), jnp.int32)
    variables = Transformer(model).init(key, tokens_BC)
    params, routing = variables["params"], variables.get("routing", {})
    return TrainState(jnp.int32(0), params, routing, optimizer.init(params))


def loss_fn(params, routing, batch, model: ModelSpec, done: jax.Array | None = None):
    """Training loss of one batch, and (cross-entropy, infos).

    Args:
      params: what is trained.
      routing: the model's other arrays.
      batch: int32 [B, C + 1].
      model: the model.
      done: float32 scalar, share of the training that is over, by which leaks fall; None: nothing leaks.
    """
    variables = {"params": params, "routing": routing}
    if done is not None:
        variables = with_leaks(variables, model, done)
    nll, _, infos = next_token_loss(model, variables, batch)
    return nll, (nll, infos)


def empty_usage(model: ModelSpec) -> tuple[jax.Array | None, ...]:
    """Zero visit counts, one array a run of equal layers; None for dense layers.

    Trees: int32 [layers, P, 2^D]. Experts: int32 [layers, 1, X].
    """
    return tuple(
        jnp.zeros((n_layers, *count_shape(ffn)), jnp.int32) if isinstance(ffn, TreeSpec | LeafSpec) else None
        for ffn, n_layers in model.runs
    )


def tokens_of(batch, n_rows: jax.Array | None) -> jax.Array | None:
    """How many tokens the first rows of a batch [B, C + 1] read; None for all."""
    return None if n_rows is None else n_rows * (batch.shape[1] - 1)


def count_usage(usage, infos: tuple[Info, ...], n_tokens: jax.Array | None = None):
    """`usage` with the visits of `infos` added.

    Args:
      usage: as `empty_usage`.
      infos: one a run, `leaf_TP` int32 [layers, T, P].
      n_tokens: int32 scalar, how many of the T count, from the first; all by default.
    """

    def add(counts, info):
        if counts is None:
            return None
        leaf = info.leaf_TP
        if n_tokens is not None:
            leaf = jnp.where((jnp.arange(leaf.shape[1]) < n_tokens)[None, :, None], leaf, -1)
        return counts + visit_counts(leaf, *counts.shape[1:])

    return tuple(add(counts, info) for counts, info in zip(usage, infos))


def train_step(
    state: TrainState,
    usage,
    batch,
    *,
    model: ModelSpec,
    optimizer,
    schedule,
    accumulation: int = 1,
    sync: str = "step",
    steps: int | None = None,
    count: bool = True,
    loss=None,
):
    """One optimizer step, then one balancing step outside the gradient.

    Args:
      state: before the step.
      usage: visit counts so far, as `empty_usage`.
      batch: int32 [B, C + 1].
      model: the model.
      optimizer: of `make_optimizer`.
      schedule: its learning rate, to report it.
      accumulation: microbatches; divides B.
      sync: how often devices exchange weights and gradients, as `gradients`.
      steps: of the whole training: leaks fall with the share that is over; without it nothing leaks.
      count: add this step's visits to `usage`; without it one sees what that costs.
      loss: another loss than `loss_fn`: (params, batch) to (loss, (cross-entropy, infos)).

    Returns:
      (state, usage, metrics): metrics are scalars `loss` (cross-entropy alone),
      `lr`, `grad_norm` (before clipping) and `update_norm` (of the change of
      the parameters: if it is finite, so are they); where steps are skipped
      also `skipped` and `in_a_row`, as `guards.SkipState`.
    """
    if loss is None:
        done = None if steps is None else state.step.astype(jnp.float32) / steps
        loss = lambda params, rows: loss_fn(params, state.routing, rows, model, done)

    def counting(params, rows):
        # Visits are counted here: the choices of all tokens of a step would not fit beside the rest.
        value, (nll, infos) = loss(params, rows)
        return value, (nll, count_usage(empty_usage(model), infos))

    grads, nll, counts = gradients(
        counting, state.params, batch, dtype=jnp.dtype(model.dtype), microbatches=accumulation, sync=sync
    )
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 step count
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=nll)
        params = optax.apply_updates(state.params, updates)
    routing = update_model_routing(model, state.routing, counts)
    metrics = {
        "loss": nll,
        "lr": schedule(state.step),
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
    }
    if isinstance(opt_state, SkipState):
        metrics |= {"skipped": opt_state.skipped, "in_a_row": opt_state.in_a_row}
    state = TrainState(state.step + 1, params, routing, opt_state)
    return state, jax.tree.map(jnp.add, usage, counts) if count else usage, metrics


def eval_step(variables: dict, usage, batch, n_rows: jax.Array | None = None, *, model: ModelSpec):
    """Mean cross-entropy of one batch, `usage` with its visits added, and its leaves, one array a run.

    Args:
      variables: {"params", "routing"} of the model.
      usage: visit counts so far, as `empty_usage`.
      batch: int32 [B, C + 1].
      n_rows: int32 scalar: only so many rows count, from the first; the others fill up the batch. None: all
        count.
      model: the model.
    """
    _, nll_BC, infos = next_token_loss(model, variables, batch)
    nll, usage = row_mean(nll_BC, n_rows=n_rows), count_usage(usage, infos, tokens_of(batch, n_rows))
    return nll, usage, tuple(info.leaf_TP for info in infos)


# A choice leaves most experts without a token that could teach them, and a token learns nothing of those it
# did not take. So training may begin dense: an expert that is not chosen adds a share of itself, the leak,
# which falls to 0 long before the end (`LeafSpec.leak_at`). What is validated, saved and run has no leak.
# Source: the idea is that of EvoMoE's gate (Nie et al. 2021, arXiv 2112.14397), whose softmax's temperature
# falls.


def leaks(ffn: FFNSpec) -> TypeGuard[LeafSpec]:
    """Whether experts that are not chosen add anything in training."""
    return isinstance(ffn, LeafSpec) and ffn.dense_start > 0


def with_leaks(variables: dict, model: ModelSpec, done: jax.Array) -> dict:
    """`variables` with the collection "leak": one number a layer with a dense start; as they are without.

    Args:
      variables: {"params", "routing"} of the model.
      model: the model.
      done: share of the training that is over, a float32 scalar.
    """
    found = {
        f"run_{i}": {"ffn": {"leak": jnp.full(length, ffn.leak_at(done))}}
        for i, (ffn, length) in enumerate(model.runs)
        if leaks(ffn)
    }
    return variables | ({"leak": found} if found else {})
