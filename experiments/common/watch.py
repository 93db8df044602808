"""The checkpoints of a run, as they come."""

import time
from collections.abc import Iterator

from tree_ffn.errors import InputError
from tree_ffn.training.checkpoint_files import checkpoint_directory, steps_on_disk
from tree_ffn.training.workdir import read_config


def newest_steps(workdir: str, seconds: float) -> Iterator[int]:
    """Steps of whole checkpoints, the newest each time, until the last step of the run has been there.

    Args:
      workdir: of the run, which has begun.
      seconds: between two looks.

    Raises:
      InputError: there is no run, or it cannot be read.
    """
    last = -1
    while True:
        config = read_config(workdir)
        if config is None:
            raise InputError(f"workdir: {workdir} holds no run; name the --workdir of a training run.")
        newest = max(steps_on_disk(checkpoint_directory(workdir)), default=-1)
        if newest > last:
            last = newest
            yield newest
        if last >= config["train"]["steps"]:
            return
        time.sleep(seconds)
