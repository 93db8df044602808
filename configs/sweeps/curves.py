"""How the gap moves: with tokens seen, with F at one A, and with A / F, around configs/t1_small.py's point.

    python -m experiments.ablate --sweep=configs/sweeps/curves.py --workdir=runs/curves \\
        --results=results/quality_curves.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...
    python -m experiments.ablate --sweep=configs/sweeps/curves.py:axis=tokens ...   # one of tokens, F, share

Text and tokenizer as for configs/t1_small.py. The point where the curves meet, 60 M tokens with A = 96 of
about 3,072 units, is made of rows of configs/sweeps/t1_small.py and quality.py, and so are trees of larger F
without a beam; the table takes them from there. 120 M tokens are the 44 M of the text 2.7 times over. All
rows have the learning rate that was best for all kinds at 15 M tokens.
"""

from configs import common
from configs.sweeps.quality import BEAM2, DENSE_START, EXPERTS, SHORT, STRAIGHT, SUM1, apart, experts

LENGTHS = {"15M": "tune", "30M": "half", "120M": "double"}
# Depths of trees over single units: a share of 2^-D.
DEPTHS = (8, 6, 4, 2)

PATHS = {"row": "tree_straight_P12_W1", **DENSE_START}
KINDS = {
    "dense": {"row": "dense"},
    "narrow": {"row": "narrow_A96"},
    "moe_top1": {"row": "moe_top1_X32"},
    "moe_top1_leak": {"row": "moe_top1_X32", **DENSE_START},
    "moe_top4_sum1_leak": {"row": "moe_top4_X128", **SUM1, **DENSE_START},
    "hash_leak": {"row": "moe_top1_X32", "ffn.kind": "hash", **DENSE_START},
    "hash_tree_leak": {"ffn.kind": "hash_tree", **PATHS},
    "tree_straight_leak": {**STRAIGHT, **PATHS},
    # The recipe (configs/recipe.py), and without its beam.
    "tree_experts_norm2_beam2_leak": {**PATHS, **EXPERTS, **BEAM2, **apart(96, 1, 5, 0)},
    "tree_experts_norm2_leak": {**PATHS, **EXPERTS, **apart(96, 1, 5, 0)},
}


def tokens():
    """Every kind for other lengths than T1's; at twice its length also twice F, and T1's steps of a start."""
    rows = {f"{kind}_{m}": {**how, "length": of} for m, of in LENGTHS.items() for kind, how in KINDS.items()}
    short = ("moe_top4_sum1_leak", "tree_experts_norm2_beam2_leak")
    rows |= {f"{kind}10_120M": {**KINDS[kind], **SHORT, "length": "double"} for kind in short}
    twice = {**KINDS["tree_experts_norm2_beam2_leak"], **apart(96, 1, 6, 0), "length": "double"}
    start = {"": {}, "10": SHORT}
    return rows | {f"tree_experts_norm2_beam2_leak{s}_D6_120M": {**twice, **how} for s, how in start.items()}


def units():
    """Mixtures and the recipe's trees of twice and four times dense's units, A = 96."""
    mixture, trees = KINDS["moe_top4_sum1_leak"], KINDS["tree_experts_norm2_beam2_leak"]
    rows = {f"moe_top4_sum1_leak_X{n}": {**mixture, **experts(n, 4, 24)} for n in (256, 512)}
    return rows | {f"tree_experts_norm2_beam2_leak_D{d}": {**trees, **apart(96, 1, d, 0)} for d in (6, 7)}


def shares():
    """A from 0.4 % to 25 % of F = 3,072; each with the narrow layer of its own A."""
    rows = {}
    for depth in DEPTHS:
        active = 3072 // 2**depth
        trees, mixture = apart(active, 1, depth, 0), experts(4 * 2**depth, 4, active // 4)
        rows |= {
            f"narrow_A{active}": {**KINDS["narrow"], **trees},
            f"hash_leak_A{active}": {**KINDS["hash_leak"], **experts(2**depth, 1, active)},
            f"moe_top4_sum1_leak_A{active}": {**KINDS["moe_top4_sum1_leak"], **mixture},
            f"tree_experts_norm2_beam2_leak_A{active}": {**KINDS["tree_experts_norm2_beam2_leak"], **trees},
            f"tree_experts_norm2_leak_A{active}": {**KINDS["tree_experts_norm2_leak"], **trees},
        }
    return rows


AXES = {"tokens": tokens, "F": units, "share": shares}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: axis (tokens, F, share, or all), seeds."""
    arg = common.parse_arg(arg, axis="all", seeds=1)
    common.check_known(arg, axis=(*AXES, "all"))
    axes = AXES if arg.axis == "all" else {arg.axis: AXES[arg.axis]}
    return {
        "config": "configs/t1_small.py",
        "table": "quality_curves",
        "seeds": list(range(arg.seeds)),
        "rows": {name: {"set": row} for axis in axes.values() for name, row in axis().items()},
    }
