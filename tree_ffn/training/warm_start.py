"""Runs that begin with a changed model: it is no longer what the config says, so it is saved beside it.

The `meta` of such a run's checkpoints has an entry `model`. The config stays that
of the run before, so the same command with the new --workdir goes on training.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tree_ffn.locks import only_writer
from tree_ffn.models.spec import ModelSpec, spec_to_dict
from tree_ffn.training import workdir
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.optimizer import make_optimizer
from tree_ffn.training.plan import Plan, check_trainable, optim_spec
from tree_ffn.training.restore import Restored, own_model
from tree_ffn.training.step import TrainState
from tree_ffn.upgrades import stamped


def begin_run(
    directory: str,
    source: Restored,
    model: ModelSpec,
    variables: dict,
    val_loss: float | None = None,
    **facts,
) -> None:
    """Writes a new run at step 0 whose weights are given: config, data facts, one checkpoint.

    Optimizer state is fresh (moments 0, step 0), so the schedule starts anew.

    Args:
      directory: workdir of the new run.
      source: the run whose config and data it has.
      model, variables: the changed model.
      val_loss: what the best checkpoint is told by.
      **facts: JSON-like, kept in the `meta` of all its checkpoints.

    Raises:
      InputError: the directory cannot be written, or another process is writing there.
    """
    params, routing = (_arrays(variables.get(name, {})) for name in ("params", "routing"))
    optimizer = make_optimizer(optim_spec(source.config))
    state = TrainState(jnp.int32(0), params, routing, optimizer.init(params))
    config, data = stamped(source.meta["config"]), source.meta["data"]
    meta = {"config": config, "data": data, "model": spec_to_dict(model), **facts}
    with only_writer(directory):
        with Checkpoints(directory, source.config.train.keep) as checkpoints:
            checkpoints.save(state, meta, val_loss)
            checkpoints.wait()
        workdir.write_json(directory, "data.json", data)
        workdir.write_json(directory, "config.json", config)


def with_own_model(plan: Plan, checkpoints: Checkpoints) -> Plan:
    """The plan of a run, with the model that its checkpoints say where that is not the config's.

    How it is executed (`ffn.implementation`, `model.remat`, `model.unroll`) is still the config's.

    Raises:
      InputError: the model cannot be trained, or not executed so.
    """
    saved = own_model(checkpoints.meta()) if checkpoints.latest is not None else None
    if saved is None:
        return plan
    how = {name: getattr(plan.model, name) for name in ("implementation", "remat", "unroll")}
    model = dataclasses.replace(saved, **how)
    check_trainable(model)
    return plan._replace(model=model)


def kept_meta(checkpoints: Checkpoints) -> dict:
    """What later checkpoints of such a run have to say again: its model, and what it was made from."""
    meta = checkpoints.meta() if checkpoints.latest is not None else {}
    return {name: value for name, value in meta.items() if name not in ("config", "data", "step")}


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)
