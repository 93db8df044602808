"""Ways to divide a training step and to recompute, tried until one fits."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from experiments.planning.compiled_step import DoesNotFit, compile_step
from tree_ffn.training.gradients import SYNCS

MOST_PARTS = 8  # of the mesh's axis model


class Choice(NamedTuple):
    """One way that was tried.

    Attributes:
      remat: model.remat.
      microbatches: train.grad_accum_steps.
      parts: mesh.model.
      sync: train.grad_sync.
      figures: of `compile_step`; None where it does not fit.
      said: what the compiler says of a step that does not fit.
    """

    remat: str
    microbatches: int
    parts: int
    sync: str = SYNCS[0]
    figures: dict[str, Any] | None = None
    said: str = ""


def choices(config, n_devices: int) -> Iterator[Choice]:
    """What is tried, in turn: the first that fits is recommended.

    Recomputing costs up to a third more. So every policy is tried with the config's microbatches, and then
    with as many as leave each device one sequence: once with the whole model's gradient on every device, and
    once with weights gathered and gradients summed in every microbatch, which sends many times as much. At
    last weights are split over `MOST_PARTS` devices.
    """
    given, rows = config.train.grad_accum_steps, config.train.batch_size
    most = max(given, rows // n_devices) if rows % n_devices == 0 else given
    for sync in SYNCS:
        for microbatches in dict.fromkeys((given, most)):
            if sync == SYNCS[0] or (microbatches > 1 and n_devices > 1):  # else the two are one
                for remat in ("none", "dots", "full"):
                    yield Choice(remat, microbatches, 1, sync)
    if n_devices % MOST_PARTS == 0:
        yield Choice("full", most, MOST_PARTS, SYNCS[-1])


def searched(config, devices: list | None, say=print) -> list[Choice]:
    """The choices that were tried, in turn; the last one fits, or none does.

    Args:
      config: the run's config.
      devices: for which it is compiled; None: those at hand.
      say: is told of each that does not fit.
    """
    tried: list[Choice] = []
    for choice in choices(config, len(devices or jax.devices())):
        try:
            return [*tried, choice._replace(figures=compile_step(chosen(config, choice), devices))]
        except DoesNotFit as error:
            tried.append(choice._replace(said=str(error)))
            way = f"remat {choice.remat}, {choice.microbatches} microbatches, grad_sync {choice.sync}"
            say(f"{way}, model {choice.parts}: {error}")
    return tried


def chosen(config, choice: Choice):
    """The config with a choice's values."""
    config = copy.deepcopy(config)
    config.model.remat, config.train.grad_accum_steps = choice.remat, choice.microbatches
    config.train.grad_sync = choice.sync
    config.mesh.data, config.mesh.model = -1, choice.parts
    return config
