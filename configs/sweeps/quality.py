"""Attempts to close the gap to dense at T1-small's size: options and shapes of the layer, A = 96.

    python -m experiments.ablate --sweep=configs/sweeps/quality.py --workdir=runs/quality \\
        --results=runs/quality.jsonl --set=data.files=... --set=data.valid_files=... --set=data.tokenizer=...

Text and tokenizer as for configs/t1_small.py. `--sweep=...:length=full,seeds=3` runs the rows that count; by
default one seed and 15 M tokens, which find candidates. A / F is 3.1 to 3.7 %, and 1.0 % in the row of D = 9.
The baselines are rows of configs/t1_small.py and of its sweep; those of `hash` and `hash_tree` are only here.
"""

from configs import common

STRAIGHT, CONTINUOUS = {"ffn.routing": "straight_through"}, {"ffn.routing": "continuous"}
SILENT, LOGISTIC = {"ffn.router": "silent"}, {"ffn.openness": "logistic"}
PRODUCT = {"ffn.gate": "product"}
# Every unit weighs what a softmax over the leaves, taken decision by decision, gives its node.
GATED = {**CONTINUOUS, **LOGISTIC, **PRODUCT}
HASH3, HASH4 = {"ffn.hash_levels": 3}, {"ffn.hash_levels": 4}


def _trees(n_trees, width, depth=7, shared=0):
    """P trees, of one width or with routers of one unit above leaves of the last width."""
    widths = (1,) * depth + width[1:] if len(width) == 2 else width
    return {"ffn.n_trees": n_trees, "ffn.node_width": widths, "ffn.depth": depth, "ffn.shared_width": shared}


def apart(n_trees, leaf_width, depth, width=1, hashed=0):
    """Trees whose routers are no units, nodes of `width` units (0: none) above leaves of `leaf_width`.

    The first `hashed` decisions are those of a hash, and take no router.
    """
    widths = (width,) * hashed + (1 + width,) * (depth - hashed) + (leaf_width,)
    shape = {"ffn.n_trees": n_trees, "ffn.node_width": widths, "ffn.depth": depth}
    return {**SILENT, **shape, "ffn.hash_levels": hashed}


def experts(n_experts, top_k, width, groups=1):
    """A mixture of experts of these sizes."""
    sizes = {"ffn.n_experts": n_experts, "ffn.top_k": top_k, "ffn.expert_width": width}
    return sizes | ({"ffn.expert_groups": groups} if groups > 1 else {})


def leak(first, share):
    """Units not in use add so much of themselves at first, and nothing after `share` of the training."""
    return {"ffn.leak": first, "ffn.leak_share": share}


DENSE_START, SHORT = leak(1.0, 0.2), leak(1.0, 0.1)
EVEN = {"ffn.balance": "sign"}  # thresholds that send half of a node's tokens to each side
SUM1 = {"ffn.renormalise": True}  # a token's gates sum to 1
NORM2 = {**SUM1, "ffn.gate_norm": 2}  # or their squares do
EXPERTS = {**GATED, **NORM2, **DENSE_START}  # with `apart`, the recipe
BEAM2 = {"ffn.beam": 2}
MANY, FEW, ONE = _trees(12, (1,)), _trees(3, (4,)), _trees(1, (12,))
LARGE = _trees(9, (1,), depth=9, shared=6)  # F = 9,213
THIN, THREE_THIN = _trees(1, (1, 91), depth=5), _trees(3, (1, 27), depth=5)


def plain(n_units):
    """A dense layer of so many units."""
    return {"ffn.kind": "narrow", **_trees(n_units, (1,), depth=0)}


ROWS = {
    # As many products a token as the recipe's, routers and all: without a beam, and with one of two.
    "plain_A336": plain(336),
    "plain_A528": plain(528),
    "moe_top1_X32_leak100_20": {"row": "moe_top1_X32", **DENSE_START},
    "hash_X32": {"row": "moe_top1_X32", "ffn.kind": "hash"},
    "hash_X32_leak100_20": {"row": "moe_top1_X32", "ffn.kind": "hash", **DENSE_START},
    "hash_tree_P12_W1": {**MANY, "ffn.kind": "hash_tree"},
    "hash_tree_P1_D5_thin": {**THIN, "ffn.kind": "hash_tree"},
    "tree_straight_P12_W1_hash4": {**STRAIGHT, **MANY, **HASH4},
    "tree_straight_P1_D5_thin_hash3": {**STRAIGHT, **THIN, **HASH3},
    "tree_straight_P3_D5_thin_hash3": {**STRAIGHT, **THREE_THIN, **HASH3},
    "tree_continuous_P1_W12_hash4": {**CONTINUOUS, **ONE, **HASH4},
    "tree_straight_P12_W1_leak100_20": {**STRAIGHT, **MANY, **DENSE_START},
    "tree_straight_P12_W1_hash4_leak100_20": {**STRAIGHT, **MANY, **HASH4, **DENSE_START},
    "hash_tree_P12_W1_leak100_20": {**MANY, "ffn.kind": "hash_tree", **DENSE_START},
    "moe_top4_X128_leak100_20": {"row": "moe_top4_X128", **DENSE_START},
    "moe_top12_X384_leak100_20": {"row": "moe_top4_X128", **experts(384, 12, 8), **DENSE_START},
    "moe_top24_X768_leak100_20": {"row": "moe_top4_X128", **experts(768, 24, 4), **DENSE_START},
    "moe_top4_X128_sum1_leak100_20": {"row": "moe_top4_X128", **SUM1, **DENSE_START},
    "moe_top12_X384_sum1_leak100_20": {"row": "moe_top4_X128", **SUM1, **experts(384, 12, 8), **DENSE_START},
    "moe_top24_X768_sum1_leak100_20": {"row": "moe_top4_X128", **SUM1, **experts(768, 24, 4), **DENSE_START},
    "moe_top4_X128_norm2_leak100_20": {"row": "moe_top4_X128", **NORM2, **DENSE_START},
    "moe_top12_X384_norm2_leak100_20": {
        "row": "moe_top4_X128", **NORM2, **experts(384, 12, 8), **DENSE_START,
    },
    # One choice in each group: as 24 trees of 32 leaves, or 48 of two units, with flat decisions.
    "moe_top24_X768_G24_leak100_20": {"row": "moe_top4_X128", **experts(768, 24, 4, 24), **DENSE_START},
    "moe_top48_X1536_G48_leak100_20": {"row": "moe_top4_X128", **experts(1536, 48, 2, 48), **DENSE_START},
    "moe_top24_X768_G24_norm2_leak100_20": {
        "row": "moe_top4_X128", **NORM2, **experts(768, 24, 4, 24), **DENSE_START,
    },
    "moe_top96_X3072_G96_norm2_leak100_20": {
        "row": "moe_top4_X128", **NORM2, **experts(3072, 96, 1, 96), **DENSE_START,
    },
    # Gates that weigh: with units that decide, with routers apart, and as experts found by decisions.
    "tree_continuous_P12_W1_gated_leak100_20": {**GATED, **MANY, **DENSE_START},
    "tree_continuous_P12_W1_apart_gated_leak100_20": {**GATED, **apart(12, 1, 7), **DENSE_START},
    "tree_continuous_P12_W1_hash4_gated_leak100_20": {**GATED, **MANY, **HASH4, **DENSE_START},
    "tree_continuous_P12_W1_apart_hash4_gated_leak100_20": {
        **GATED, **apart(12, 1, 7, hashed=4), **DENSE_START,
    },
    "tree_continuous_P4_D5_experts_leak100_20": {**GATED, **apart(4, 24, 5, 0), **DENSE_START},
    "tree_continuous_P12_D5_experts_leak100_20": {**GATED, **apart(12, 8, 5, 0), **DENSE_START},
    "tree_continuous_P24_D5_experts_leak100_20": {**GATED, **apart(24, 4, 5, 0), **DENSE_START},
    "tree_continuous_P48_D5_experts_leak100_20": {**GATED, **apart(48, 2, 5, 0), **DENSE_START},
    "tree_continuous_P96_D5_experts_leak100_20": {**GATED, **apart(96, 1, 5, 0), **DENSE_START},
    "tree_continuous_P24_D5_experts_sum1_leak100_20": {**GATED, **SUM1, **apart(24, 4, 5, 0), **DENSE_START},
    "tree_continuous_P48_D5_experts_sum1_leak100_20": {**GATED, **SUM1, **apart(48, 2, 5, 0), **DENSE_START},
    "tree_continuous_P96_D5_experts_sum1_leak100_20": {**GATED, **SUM1, **apart(96, 1, 5, 0), **DENSE_START},
    "tree_continuous_P24_D5_experts_norm2_leak100_20": {**EXPERTS, **apart(24, 4, 5, 0)},
    "tree_continuous_P48_D5_experts_norm2_leak100_20": {**EXPERTS, **apart(48, 2, 5, 0)},
    "tree_continuous_P96_D5_experts_norm2_leak100_20": {**EXPERTS, **apart(96, 1, 5, 0)},
    "tree_continuous_P96_D5_experts_norm2_leak50_20": {**EXPERTS, **apart(96, 1, 5, 0), **leak(0.5, 0.2)},
    # The token goes to the likelier of the leaves that a search of two nodes a level finds.
    "tree_continuous_P24_D5_experts_norm2_beam2_leak100_20": {**EXPERTS, **BEAM2, **apart(24, 4, 5, 0)},
    "tree_continuous_P48_D5_experts_norm2_beam2_leak100_20": {**EXPERTS, **BEAM2, **apart(48, 2, 5, 0)},
    "tree_continuous_P96_D5_experts_norm2_beam2_leak100_20": {**EXPERTS, **BEAM2, **apart(96, 1, 5, 0)},
    # A start of half the length.
    "tree_continuous_P96_D5_experts_norm2_beam2_leak100_10": {
        **EXPERTS, **BEAM2, **apart(96, 1, 5, 0), **SHORT,
    },
    "moe_top4_X128_sum1_leak100_10": {"row": "moe_top4_X128", **SUM1, **SHORT},
    # F twice and four times dense's.
    "tree_continuous_P24_D7_experts_leak100_20": {**GATED, **apart(24, 4, 7, 0), **DENSE_START},
    "tree_continuous_P96_D6_experts_norm2_leak100_20": {**EXPERTS, **apart(96, 1, 6, 0)},
    "tree_continuous_P96_D7_experts_norm2_leak100_20": {**EXPERTS, **apart(96, 1, 7, 0)},
    # Fewer of them at work.
    "tree_continuous_P48_D7_experts_norm2_beam2_leak100_20": {**EXPERTS, **BEAM2, **apart(48, 1, 7, 0)},
    "tree_continuous_P24_D8_experts_norm2_beam2_leak100_20": {**EXPERTS, **BEAM2, **apart(24, 1, 8, 0)},
    "moe_top12_X768_norm2_leak100_20": {
        "row": "moe_top4_X128", **NORM2, **experts(768, 12, 8), **DENSE_START,
    },
    "moe_top12_X1536_norm2_leak100_20": {
        "row": "moe_top4_X128", **NORM2, **experts(1536, 12, 8), **DENSE_START,
    },
    # Without the dense start.
    "moe_top4_X128_sum1": {"row": "moe_top4_X128", **SUM1},
    "tree_continuous_P24_D5_experts": {"row": "tree_straight_P12_W1", **GATED, **apart(24, 4, 5, 0)},
    "tree_continuous_P96_D5_experts_norm2": {
        "row": "tree_straight_P12_W1", **GATED, **NORM2, **apart(96, 1, 5, 0),
    },
    "random_tree_P12_W1_leak100_20": {**MANY, "ffn.kind": "random_tree", **DENSE_START},
    "tree_straight_P12_W1_leak100_10": {**STRAIGHT, **MANY, **SHORT},
    "tree_straight_P12_W1_leak100_40": {**STRAIGHT, **MANY, **leak(1.0, 0.4)},
    "tree_straight_P1_D5_thin_leak100_20": {**STRAIGHT, **THIN, **DENSE_START},
    "tree_straight_P9_D9_S6_leak100_20": {**STRAIGHT, **LARGE, **DENSE_START},
    "hash_tree_P9_D9_S6_leak100_20": {"ffn.kind": "hash_tree", **LARGE, **DENSE_START},
    "tree_straight_P3_W4": {**STRAIGHT, **FEW},
    "tree_straight_P3_W4_silent": {**STRAIGHT, **FEW, **SILENT},
    "tree_straight_P1_W12": {**STRAIGHT, **ONE},
    "tree_straight_P1_W12_silent": {**STRAIGHT, **ONE, **SILENT},
    "tree_straight_P1_D5_thin": {**STRAIGHT, **THIN},
    "tree_straight_P1_D5_thin_silent": {**STRAIGHT, **THIN, **SILENT},
    "tree_straight_P3_D5_thin_silent": {**STRAIGHT, **THREE_THIN, **SILENT},
    "tree_straight_P5_D8_S51": {**STRAIGHT, **_trees(5, (1,), depth=8, shared=51)},
    "tree_straight_P9_D9_S6": {**STRAIGHT, **LARGE},
    "tree_continuous_P12_W1_logistic": {**CONTINUOUS, **MANY, **LOGISTIC},
    "tree_continuous_P12_W1_logistic_product": {**CONTINUOUS, **MANY, **LOGISTIC, **PRODUCT},
    "tree_continuous_P1_W12_silent": {**CONTINUOUS, **ONE, **SILENT},
    "tree_continuous_P1_W12_logistic": {**CONTINUOUS, **ONE, **LOGISTIC},
    "tree_continuous_P1_D5_thin_silent_logistic_product": {
        **CONTINUOUS, **THIN, **SILENT, **LOGISTIC, **PRODUCT,
    },
}  # fmt: skip


def get_sweep(arg=None):
    """The sweep as plain data. Arguments: length (tune or full), seeds."""
    arg = common.parse_arg(arg, length="tune", seeds=1)
    rows = {}
    for name, row in ROWS.items():
        # A leak needs masked execution, which T1's continuous rows have not.
        grouped = row.get("ffn.routing") == "continuous" and "ffn.leak" not in row
        base = "tree_continuous_P1_W12" if grouped else "tree_straight_P12_W1"
        rows[name] = {"set": {"row": base, "length": arg.length, **row}}
    return {
        "config": "configs/t1_small.py",
        "table": "quality_attempts",
        "seeds": list(range(arg.seeds)),
        "rows": rows,
    }
