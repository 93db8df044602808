"""The leaf layer at T1-small's size: one tree over small experts, of which a token takes the K likeliest.

    python -m experiments.ablate --sweep=configs/sweeps/leaves.py --workdir=runs/leaves --gpus=0,1 \\
        --results=results/quality.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py. `recipe` is the recommended layer: 512 experts of 6 units, 16
active, rms gates, b2 .99, 2.12e-3, first output weights of 0.2 / sqrt(A) (its rows were trained under the
name `leaf_X512_K16_rms_beam_b99_lr212_out4`). Other names say what they have (docs/quality.md); those without
`out` start with 0.05 / sqrt(A).

Protocol, written before the rows of `NEXT` were run: all have a weight decay of 1 (configs/sweeps/decay.py),
and with seed 0 each is compared with the recipe of that decay (`recipe_wd100`, 4.1498). One that ends more
than .02 nats below gets seeds 1 and 2, and the recipe is replaced by the best of those whose mean of the
three is lower and whose products all in are at most 5 % of dense's. `recipe_wd100_x2` has twice the store,
`recipe_wd100_K24` 6.8 % of dense's products.
"""

from configs import common


def experts(n_experts, top_k, width, n_trees=1):
    """Experts of these sizes."""
    sizes = {"ffn.n_experts": n_experts, "ffn.top_k": top_k, "ffn.expert_width": width}
    return sizes | ({"ffn.n_trees": n_trees} if n_trees > 1 else {})


LEAVES = {"row": "leaf_X512_K16", "ffn.gate_norm": "l2", "optim.lr": 2.12e-3}
RMS = {**LEAVES, "ffn.gate_norm": "rms", "optim.b2": 0.99}
QUIET = {**RMS, **experts(512, 16, 6)}
RECIPE = {**QUIET, "model.init.w_out": 0.2}
TWICE = {**RMS, **experts(1024, 16, 6)}
KEYS, SOFTMAX = {"ffn.router": "product_keys"}, {"ffn.router": "softmax", "ffn.balance_rate": 1e-3}

DONE = {
    "leaf_X512_K16_beam": {**LEAVES, **experts(512, 16, 6)},
    # Its rate and the length of its dense start.
    "leaf_X512_K16_rms_beam_b99_lr212": QUIET,
    "leaf_X512_K16_rms_beam_b99": {**QUIET, "optim.lr": 1.5e-3},
    "leaf_X512_K16_rms_beam_b99_lr300": {**QUIET, "optim.lr": 3e-3},
    "leaf_X512_K16_rms_beam_b99_lr212_start10": {**QUIET, "ffn.dense_start": 0.1},
    # Coarser experts; more of them.
    "leaf_X256_K8_rms_beam_b99_lr212": {**RMS, **experts(256, 8, 12)},
    "leaf_x2_X1024_K16_rms_beam_b99": {**TWICE, "optim.lr": 1.5e-3},
    "leaf_x2_X1024_K16_rms_beam_b99_lr212": TWICE,
    # Louder outputs at first, the best of which are the recipe; a longer memory; a longer dense start.
    "recipe": RECIPE,
    "recipe_lr150": {**RECIPE, "optim.lr": 1.5e-3},
    "leaf_X512_K16_rms_beam_b99_lr212_out2": {**QUIET, "model.init.w_out": 0.1},
    "leaf_X512_K16_rms_beam_b99_lr212_out8": {**QUIET, "model.init.w_out": 0.4},
    "leaf_X512_K16_rms_beam_b999_lr212": {**QUIET, "optim.b2": 0.999},
    "leaf_X512_K16_rms_beam_b99_lr212_start30": {**QUIET, "ffn.dense_start": 0.3},
    # Finer experts and fewer active units, for 207 to 301 products; twice the store.
    "leaf_X1024_K16_rms_beam_b99_lr212": {**RMS, **experts(1024, 16, 3)},
    "leaf_X1024_K24_rms_beam_b99_lr212": {**RMS, **experts(1024, 24, 3)},
    "leaf_X3072_K32_rms_beam_b99_lr212": {**RMS, **experts(3072, 32, 1, n_trees=3)},
    "leaf_x2_X2048_K16_rms_beam_b99_lr212": {**RMS, **experts(2048, 16, 3)},
    # Other routers over the same experts.
    "leaf_X512_K16_rms_softmax_b99_lr212": {**QUIET, **SOFTMAX},
    "leaf_X512_K16_rms_softmax_b99": {**QUIET, **SOFTMAX, "ffn.balance_rate": 1e-2, "optim.lr": 1.5e-3},
    "leaf_X512_K16_rms_keys_b99_lr212": {**QUIET, **KEYS},
    "leaf_X1024_K32_rms_keys_b99_lr212": {**RMS, **experts(1024, 32, 3), **KEYS},
    "leaf_X3072_K96_rms_keys_b99_lr212": {**RMS, **experts(3072, 96, 1), **KEYS},
    "leaf_X512_K16_rms_random_b99_lr212": {**QUIET, "ffn.router": "random"},
}
FORGETS = {**RECIPE, "optim.weight_decay": 1.0}
NEXT = {
    # The rate, the start and the first outputs again.
    "recipe_wd100_lr150": {**FORGETS, "optim.lr": 1.5e-3},
    "recipe_wd100_lr300": {**FORGETS, "optim.lr": 3e-3},
    "recipe_wd100_start10": {**FORGETS, "ffn.dense_start": 0.1},
    "recipe_wd100_start30": {**FORGETS, "ffn.dense_start": 0.3},
    "recipe_wd100_out2": {**FORGETS, "model.init.w_out": 0.1},
    # More experts at work, for 415 products; finer ones; twice the store.
    "recipe_wd100_K24": {**FORGETS, **experts(512, 24, 6)},
    "recipe_wd100_X1024_K24": {**FORGETS, **experts(1024, 24, 3)},
    "recipe_wd100_x2": {**FORGETS, **experts(1024, 16, 6)},
    # Other routers.
    "recipe_wd100_keys": {**FORGETS, **KEYS},
    "recipe_wd100_random": {**FORGETS, "ffn.router": "random"},
}
ROWS = DONE | NEXT


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: seeds, the first of them, length (of configs/t1_small.py)."""
    return sweep_of(ROWS, "quality_attempts", arg)


def sweep_of(rows, table, arg, length="full"):
    """A sweep of rows of configs/t1_small.py, each at its own rate."""
    arg = common.parse_arg(arg, seeds=1, first=0, length=length)
    return {
        "config": "configs/t1_small.py",
        "table": table,
        "seeds": list(range(arg.first, arg.seeds)),
        "rows": {name: {"set": {"length": arg.length, **row}} for name, row in rows.items()},
    }
