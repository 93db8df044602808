"""A language model of any size and kind of feed-forward layer; every knob at its first value.

    python -m experiments.train --config=configs/default.py --workdir=runs/micro
    python -m experiments.train --config=configs/default.py --config.model.preset=opt_1.3b --describe
    python -m experiments.train --config=configs/default.py:kind=narrow --workdir=runs/narrow

The layer is that of configs/recipe.py. Corpus: the running Python's standard library, as bytes.
"""

from configs import recipe


def get_config(arg=None):
    """Arguments: preset (tree_ffn/models/from_config.py), kind (of the feed-forward layers), seed."""
    return recipe.get_config(arg)
