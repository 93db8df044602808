"""How fine-tunings are set: by which learning rate, and how much they listen to the teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

from configs import finetune as finetune_config
from experiments.sweeps import tuning
from tree_ffn.training import workdir as workdirs


class Settings(NamedTuple):
    """What is chosen by tuning: learning rate, and weight of distillation (0 for none)."""

    lr: float
    weight: float


def choice(
    known: Callable[[Settings], float | None], grid: tuning.Grid, weights: list[float], distilled: bool
) -> tuple[Settings | None, list[Settings]]:
    """(the settings of the lowest loss, None while it is open; what has to be tried before that is known).

    First the rates of the grid and beyond; then as many runs more as there are other weights, in both ways
    alike: with these weights, or by rates between those that were tried.

    Args:
      known: validation loss of settings, inf where they diverged; None where they were not tried.
      grid: of learning rates.
      weights: of distillation; the first is that of the first runs.
      distilled: whether there is a teacher; without one the weight is 0.
    """
    weight, losses = weights[0] if distilled else 0.0, {}
    while rates := tuning.next_values(losses, grid):
        found = {lr: known(Settings(lr, weight)) for lr in rates}
        if missing := [Settings(lr, weight) for lr, loss in found.items() if loss is None]:
            return None, missing
        losses |= found
    best, more = tuning.best_value(losses), []
    for i, other in enumerate(weights[1:]):
        factor = tuning.FACTOR ** ((0.5, -0.5, 0.25, -0.25)[i % 4])
        more.append(Settings(best, other) if distilled else Settings(float(f"{best * factor:.3g}"), 0.0))
    tried = {Settings(lr, weight): loss for lr, loss in losses.items()}
    tried |= {settings: known(settings) for settings in more}
    if missing := [settings for settings, loss in tried.items() if loss is None]:
        return None, missing
    return min(tried, key=lambda settings: tried[settings]), []


def config_for(
    dense: str, start: str, settings: Settings, *, steps: int, seed: int, faded: bool = False
) -> Any:
    """The config of a fine-tuning on the text of the dense run, by batches of its size.

    Args:
      dense: workdir of the dense run, which teaches or is compared with.
      start: workdir of the model to train.
      settings: of `choose`.
      steps, seed: of the run.
      faded: dense layers fade out over the first half.
    """
    trained = workdirs.read_config(dense) or {}
    config: Any = finetune_config.get_config(f"steps={steps},seed={seed}")
    config.data.update(trained["data"])
    config.mesh.update(trained["mesh"])
    for name in ("batch_size", "grad_accum_steps", "eval_batches"):
        config.train[name] = trained["train"][name]
    config.train.eval_every = max(1, steps // 10)
    config.optim.lr = settings.lr
    config.finetune.start, config.finetune.teacher = start, dense
    config.finetune.kl = config.finetune.ffn = settings.weight
    if faded:
        config.finetune.gradual, config.finetune.gradual_steps = "mix", max(1, steps // 2)
    return config
