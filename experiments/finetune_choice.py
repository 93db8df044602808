"""How fine-tunings are set: by which learning rate, and how much they listen to the teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

from configs import finetune as finetune_config
from experiments import tuning
from tree_ffn.training import workdir as workdirs


class Settings(NamedTuple):
    """What is chosen by tuning: learning rate, and weight of distillation (0 for none)."""

    lr: float
    weight: float


def choose(tune: Callable[[str, Settings], float], grid: tuning.Grid, weights: list[float]) -> dict:
    """{way: settings} of the lowest validation loss, by one rule for both ways.

    Args:
      tune: (way, settings) to the loss.
      grid: of learning rates.
      weights: of distillation; the first is that of the first runs.
    """
    chosen = {}
    for way, weight in (("tuned", 0.0), ("distilled", weights[0])):
        losses: dict[float, float] = {}
        while rates := tuning.next_values(losses, grid):
            losses |= {lr: tune(way, Settings(lr, weight)) for lr in rates}
        tried = {Settings(lr, weight): loss for lr, loss in losses.items()}
        best = tuning.best_value(losses)
        # As many runs more for each way: other weights, or rates between those that were tried.
        for i, other in enumerate(weights[1:]):
            factor = tuning.FACTOR ** ((0.5, -0.5, 0.25, -0.25)[i % 4])
            more = Settings(best, other) if weight else Settings(float(f"{best * factor:.3g}"), 0.0)
            tried[more] = tune(way, more)
        chosen[way] = min(tried, key=lambda settings: tried[settings])
    return chosen


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
    trained = workdirs.read_json(dense, "config.json") or {}
    config: Any = finetune_config.get_config(f"steps={steps},seed={seed}")
    config.data.update(trained["data"])
    config.mesh.update(trained["mesh"])
    for name in ("batch_size", "accumulation", "eval_batches"):
        config.train[name] = trained["train"][name]
    config.train.eval_every = max(1, steps // 10)
    config.optim.lr = settings.lr
    config.finetune.start, config.finetune.teacher = start, dense
    config.finetune.kl = config.finetune.ffn = settings.weight
    if faded:
        config.finetune.gradual, config.finetune.gradual_steps = "mix", max(1, steps // 2)
    return config
