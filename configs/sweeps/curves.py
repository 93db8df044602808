"""How the gap moves: with tokens seen, with F at one A, and with A / F, around configs/t1_small.py's point.

    python -m experiments.ablate --sweep=configs/sweeps/curves.py --workdir=runs/curves \\
        --results=results/quality_curves.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...
    python -m experiments.ablate --sweep=configs/sweeps/curves.py:axis=tokens ...   # one of tokens, F, share

Text and tokenizer as for configs/t1_small.py. The point where the curves meet, 60 M tokens with A = 96 of
about 3,072 units, is made of rows of configs/sweeps/t1_small.py and quality.py: the table takes it from
there. 120 M tokens are the 44 M of the text 2.7 times over. All rows have the learning rate that was best
for all kinds at 15 M tokens.
"""

from configs import common
from configs.sweeps.quality import DENSE_START, STRAIGHT

LENGTHS = {"15M": "tune", "30M": "half", "120M": "double"}
# F of two and three times dense's. One level wider, or two more levels (and 6 units always on).
LARGE = {
    "P8_leaf5": {"ffn.n_trees": 8, "ffn.node_width": (1,) * 7 + (5,)},
    "P9_D9_S6": {"ffn.n_trees": 9, "ffn.node_width": (1,), "ffn.depth": 9, "ffn.shared_width": 6},
}
# A share of about (D + 1) / 2^(D + 1): depth, trees for F = 3,048 to 3,087, and experts for about as many.
SHARES = {9: (3, 102), 8: (6, 57), 6: (24, 18), 5: (49, 10), 3: (205, 4)}

# The recipe (configs/recipe.py), learned and hashed; a mixture of experts without and with its dense start.
TREES = {
    "hash_tree_leak": {"ffn.kind": "hash_tree", **DENSE_START},
    "tree_straight_leak": {**STRAIGHT, **DENSE_START},
}
EXPERTS = {"moe_top1": {}, "moe_top1_leak": DENSE_START}
KINDS = {
    "dense": {"row": "dense"},
    "narrow": {"row": "narrow_A96"},
    **{kind: {"row": "moe_top1_X32", **how} for kind, how in EXPERTS.items()},
    **{kind: {"row": "tree_straight_P12_W1", **how} for kind, how in TREES.items()},
}


def tokens():
    """Every kind for other lengths than T1's."""
    return {f"{kind}_{m}": {**how, "length": of} for m, of in LENGTHS.items() for kind, how in KINDS.items()}


def units():
    """F of twice dense's and more, A = 96."""
    rows = {f"{kind}_X{n}": {**KINDS[kind], "ffn.n_experts": n} for kind in EXPERTS for n in (64, 128)}
    return rows | {f"{kind}_{name}": {**KINDS[kind], **how} for kind in TREES for name, how in LARGE.items()}


def shares():
    """A from 1 % to 27 % of F, about dense's; each with the narrow layer of its own A."""
    rows = {}
    for depth, (n_trees, n_experts) in SHARES.items():
        shape = {"ffn.n_trees": n_trees, "ffn.node_width": (1,), "ffn.depth": depth}
        active = n_trees * (depth + 1)
        experts = {**shape, "ffn.n_experts": n_experts, "ffn.expert_width": active}
        for kind, how in KINDS.items():
            if kind != "dense":
                rows[f"{kind}_A{active}"] = {**how, **(experts if kind in EXPERTS else shape)}
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
