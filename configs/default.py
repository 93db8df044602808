"""A language model of any size and kind of feed-forward layer; every knob at its first value.

    python -m experiments.train --config=configs/default.py --workdir=runs/micro
    python -m experiments.train --config=configs/default.py --config.model.preset=opt_1.3b --describe
    python -m experiments.train --config=configs/default.py:kind=narrow --workdir=runs/narrow

Corpus: the running Python's standard library, as bytes.
"""

from configs import common


def get_config(arg=None):
    """Arguments: preset (configs/presets.py), kind (of the feed-forward layers), seed."""
    arg = common.parse_arg(arg, preset="", kind="tree", seed=0)
    config = common.base_config()
    config.seed = arg.seed
    config.model.preset = arg.preset
    config.ffn.kind = arg.kind
    return config
