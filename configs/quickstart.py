"""What `make quickstart` trains: two layers on the bytes of Python's standard library, about a minute a kind.

    python -m experiments.quickstart                 # both kinds, one table
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/tree
    python -m experiments.train --config=configs/quickstart.py:kind=narrow --workdir=runs/narrow

A tree layer is configs/recipe.py's `EXPERTS`: F = 512 units, A = 16 of which (3.1 %) work for a token; with
`layer=paths` its `PATHS`, F = 510. `narrow` is dense with A units, `dense` with F.
"""

from configs import common, recipe

# The best of 3e-3, 6e-3 and 12e-3, and of 0.05 and 0.15 for the scale of the output weights, by the mean of
# three seeds each (configs/sweeps/quickstart.py): experts 6e-3 and 0.05, when they had no beam, paths and
# narrow 6e-3 and 0.15. The others were not tuned.
LR, W_OUT, W_OUT_EXPERTS = 6e-3, 0.15, 0.05
LAYERS = {"experts": recipe.EXPERTS, "paths": recipe.PATHS}


def get_config(arg=None):
    """Arguments: kind (of the feed-forward layers), layer (of LAYERS; or the recipe's), steps, seed."""
    arg = common.parse_arg(arg, kind="tree", layer="", steps=1000, seed=0)
    if arg.layer:
        common.check_known(arg, layer=LAYERS)
    if arg.layer == "experts" and arg.kind in recipe.UNLEARNED:
        raise ValueError(
            f"config argument: layer=experts cannot be used with kind={arg.kind}, "
            "whose decisions are not learned; use layer=paths."
        )
    config = common.base_config()
    config.seed = arg.seed

    model = config.model
    model.n_layers, model.width, model.n_heads, model.context = 2, 128, 4, 128

    layer = LAYERS[arg.layer] if arg.layer else recipe.layer_of(arg.kind)
    recipe.set_layer(config, arg.kind, layer)
    model.init.w_out = W_OUT_EXPERTS if arg.kind == "tree" and layer is recipe.EXPERTS else W_OUT

    config.data.format = "memory"  # 11 MB: a NumPy file opens at once

    config.train.batch_size, config.train.steps = 16, arg.steps
    config.train.log_every = max(1, arg.steps // 14)
    config.train.eval_every = config.train.checkpoint_every = 0  # at the end only
    config.train.eval_batches = 100

    config.optim.lr = LR
    config.optim.final_share = 0.05
    return config
