"""The recommended layer: trees of single units, straight-through decisions, and a training that begins dense.

    python -m experiments.train --config=configs/recipe.py --workdir=runs/mine
    python -m experiments.train --config=configs/recipe.py:preset=opt_125m --config.model.dtype=bfloat16 \\
        --config.data.files='TEXT/*.txt.xz' --config.data.tokenizer=tokenizer.json --workdir=runs/125m
    python -m experiments.train --config=configs/recipe.py:kind=narrow --workdir=runs/narrow    # a baseline

E / 64 trees of depth 7 with one unit a node: F is about 4 E, A / F = 8 / 255 = 3.1 %. For the first fifth of
the training units off the path add a share of what they would add on it, from all of it down to nothing
(`ffn.leak`, `ffn.leak_share`): decisions are learned while the units below them already are. After that, and
whenever the model is used, a token has its paths and nothing else. `kind=hash_tree` takes the decisions by a
hash of the token's id instead: it ends lower still, but a layer must then know the ids.

Evidence (docs/quality.md; T1-small, 60 M tokens, three seeds): it closes 0.72 +- 0.04 of the gap between
narrow and dense, hashed 0.83 +- 0.04; straight-through decisions without the start 0.34 +- 0.07, the paper's
hard rule 0.24 +- 0.04, mixtures of experts 0.25 +- 0.06 (top-1) and 0.30 +- 0.10 (top-4), and from the same
start 0.69 +- 0.03 and 0.76 (top-4: one seed), hashed experts 0.76 +- 0.03.
"""

from configs import common

LAYER = {
    "kind": "tree",
    "routing": "straight_through",
    "depth": 7,
    "node_width": (1,),
    "leak": 1.0,
    "leak_share": 0.2,
}


def set_layer(config, kind="tree"):
    """Makes a config's feed-forward layers the recommended ones, or of another kind with their F and A."""
    ffn = config.ffn
    for key, value in LAYER.items():
        ffn[key] = value
    ffn.n_trees = common.follow(1, lambda width: max(1, width // 64), config.model.get_ref("width"))
    ffn.kind = kind


def get_config(arg=None):
    """Arguments: preset (configs/presets.py), kind (of the feed-forward layers), seed."""
    arg = common.parse_arg(arg, preset="", kind="tree", seed=0)
    config = common.base_config()
    config.seed = arg.seed
    config.model.preset = arg.preset
    set_layer(config, arg.kind)
    return config
