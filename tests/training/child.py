"""A training run that is watched, here or as a process: python -m tests.training.child '{"texts": ..., ...}'.

Writes the sha256 of every training batch, in order, to WORKDIR/batches.txt, and
kills itself without warning before the step `kill_before`, if one is given.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys

from tests.training.tiny import tiny_config
from tree_ffn.training import loop


def main(texts: str, workdir: str, kill_before: int | None = None, **changes) -> None:
    config = tiny_config(pathlib.Path(texts), **changes)
    put_rows, seen = loop.put_rows, 0

    def watched(batch, *rest):
        nonlocal seen
        seen += 1
        if seen == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{workdir}/batches.txt", "a") as file:
            file.write(hashlib.sha256(batch.tobytes()).hexdigest() + "\n")
        return put_rows(batch, *rest)

    loop.put_rows = watched
    try:
        loop.train(config, workdir, bar=False)
    finally:
        loop.put_rows = put_rows


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
