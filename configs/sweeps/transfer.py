"""Whether the recipe keeps its place at other widths and on other text, with nothing tuned again.

    python -m experiments.ablate --sweep=configs/sweeps/transfer.py --workdir=runs/transfer \\
        --results=results/quality_transfer.jsonl \\
        --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...
    python -m experiments.ablate --sweep=configs/sweeps/transfer.py:width=768 ...    # T1's width: other text

Steps, batches and rates are those of configs/t1_small.py, text and tokenizer as for it. A layer of width E
has about F = 4 E units, of which A = E / 8 work for a token: E / 8 trees that find single units, or E / 64
of the paper's shape, as in configs/recipe.py.
"""

from configs import common
from configs.sweeps.quality import BEAM2, DENSE_START, EXPERTS, STRAIGHT, SUM1, apart

WIDTHS = (512, 1024)
KINDS = {
    "dense": {"row": "dense"},
    "narrow": {"row": "narrow_A96"},
    "moe_top1": {"row": "moe_top1_X32"},
    "moe_top1_leak100_20": {"row": "moe_top1_X32", **DENSE_START},
    "hash_leak100_20": {"row": "moe_top1_X32", "ffn.kind": "hash", **DENSE_START},
    "hash_tree_leak100_20": {"row": "tree_straight_P12_W1", "ffn.kind": "hash_tree", **DENSE_START},
    "tree_straight_leak100_20": {"row": "tree_straight_P12_W1", **STRAIGHT, **DENSE_START},
    "moe_top4_sum1_leak100_20": {"row": "moe_top4_X128", **SUM1, **DENSE_START},
    "tree_experts_norm2_beam2_leak100_20": {"row": "tree_straight_P12_W1", **EXPERTS, **BEAM2},
    "tree_experts_norm2_leak100_20": {"row": "tree_straight_P12_W1", **EXPERTS},
}


def sized(kind, width):
    """What a model of one width has in place of T1's."""
    model, n = {"model.width": width, "model.n_heads": width // 64}, width // 64
    if kind.startswith("tree_experts"):
        return {**model, **apart(8 * n, 1, 5, 0)}
    paths = {"ffn.n_trees": n, "ffn.node_width": (1,), "ffn.depth": 7}
    return {**model, **paths, "ffn.expert_width": 8 * n // (4 if kind.startswith("moe_top4") else 1)}


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: width (0: 512 and 1024), length (of configs/t1_small.py), seeds."""
    arg = common.parse_arg(arg, width=0, length="full", seeds=1)
    return {
        "config": "configs/t1_small.py",
        "table": "quality_transfer",
        "seeds": list(range(arg.seeds)),
        "rows": {
            f"{kind}_E{width}": {"set": {**how, **sized(kind, width), "length": arg.length}}
            for width in ([arg.width] if arg.width else WIDTHS)
            for kind, how in KINDS.items()
        },
    }
