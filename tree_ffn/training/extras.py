"""What a run does for those who look on, where they ask for it: a trace of some steps, metrics on W&B."""

import importlib.util
import os
from collections.abc import Callable

import jax

from tree_ffn.errors import InputError, reason

TRACED = 3  # steps


class Trace:
    """Traces `TRACED` steps by jax.profiler, for TensorBoard or Perfetto.

    Args:
      directory: takes the trace.
      at: after so many finished steps it begins; 0: never.
    """

    def __init__(self, directory: str, at: int):
        self._directory, self._at, self._is_on = directory, at, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._is_on:
            jax.profiler.stop_trace()

    def step(self, step: int, result) -> None:
        """A step was dispatched; `result` is there when it has finished."""
        if 0 < self._at == step:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self._directory)
            self._is_on = True
        elif self._is_on and step >= self._at + TRACED:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._is_on = False


def check_wandb(project: str) -> None:
    """Raises InputError where metrics are to go to Weights & Biases, and its package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(f"train.wandb: {project!r} needs the package wandb; install tree_ffn[wandb].")


def wandb_writer(project: str, run: str, directory: str, config: dict) -> Callable[[int | None, dict], None]:
    """Function (step, scalars) that sends metrics to Weights & Biases; the step None ends it.

    Args:
      project: there.
      run: id of the run there; the same one goes on with it.
      directory: takes the package's files.
      config: of the run.

    Raises:
      InputError: it cannot be reached.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    os.makedirs(directory, exist_ok=True)
    quiet = wandb.Settings(silent=True, console="off")
    try:
        there = wandb.init(
            project=project, id=run, resume="allow", dir=directory, config=config, settings=quiet
        )  # fmt: skip
    except Exception as error:  # of the network, of the account
        raise InputError(
            f"train.wandb: {project!r} cannot be reached ({reason(error)}); with WANDB_MODE=offline metrics "
            "stay here."
        ) from error
    there.define_metric("*", step_metric="step")  # a resumed run may come to a step again

    def write(step: int | None, scalars: dict) -> None:
        if step is None:
            there.finish()
        else:
            there.log({**scalars, "step": step})

    return write
