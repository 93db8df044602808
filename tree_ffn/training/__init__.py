"""Training: optimizer, step, loop, checkpoints, sharding and metrics.

`train(config, workdir)` of `loop` is the whole of it; `experiments/train.py`
is its program.
"""
