"""Attempts to close the gap at the quickstart's size, on words: 3 minutes a row on two cores.

    python -m experiments.train_tokenizer --files='TEXT/wikipedia2015/train_00.txt.xz' --to=runs/words.json
    python -m experiments.ablate --sweep=configs/sweeps/quality_words.py --workdir=runs/quality_words \\
        --results=runs/quality_words.jsonl --set=data.tokenizer=runs/words.json \\
        --set=data.files=TEXT/wikipedia2015/train_00.txt.xz \\
        --set=data.valid_files=TEXT/wikipedia2015/valid.txt.xz

2 M tokens of a byte-pair vocabulary of 4,096, a model of two layers, one seed: they find candidates for
larger runs and prove nothing. On bytes (quality_cpu.py) a layer that is told which of 257 symbols it has
knows most there is to know; on words the order of the kinds is nearer to that of configs/t1_small.py. A = 16
of F = 510 units, but for rows that say otherwise. One learning rate for all, quality_cpu.py's.
"""

from configs import common
from configs.sweeps.quality import (
    BEAM2,
    DENSE_START,
    EVEN,
    EXPERTS,
    GATED,
    HASH4,
    NORM2,
    STRAIGHT,
    SUM1,
    apart,
    experts,
    leak,
    plain,
)  # fmt: skip
from configs.sweeps.quality_cpu import PLAIN, THIN

LARGE = {"ffn.depth": 9}  # F = 2,046, four times dense's, and A = 20
RELU2 = {"ffn.activation": "relu2"}
B2_99, B2_999 = {"optim.b2": 0.99}, {"optim.b2": 0.999}
PATHS = {**STRAIGHT, **DENSE_START}
APART = {**GATED, **apart(2, 1, 7), **DENSE_START}
RECIPE = {**EXPERTS, **BEAM2, **apart(16, 1, 5, 0)}

ROWS = {
    "dense": {"kind": "dense"},
    "narrow_A16": {"kind": "narrow"},
    "plain_A56": {"kind": "narrow", **plain(56)},  # as many products as 16 trees over single units
    "plain_A88": {"kind": "narrow", **plain(88)},  # with a beam of two
    "moe_top1_X32": {"kind": "moe"},
    "moe_top1_X32_leak100_20": {"kind": "moe", **DENSE_START},
    "hash_X32_leak100_20": {"kind": "hash", **DENSE_START},
    "hash_tree_P2_W1_leak100_20": {"kind": "hash_tree", **DENSE_START},
    "tree_straight_P2_W1": STRAIGHT,
    "tree_straight_P2_W1_leak100_20": PATHS,
    "tree_straight_P2_W1_leak100_10": {**STRAIGHT, **leak(1.0, 0.1)},
    "tree_straight_P2_W1_leak100_40": {**STRAIGHT, **leak(1.0, 0.4)},
    "tree_straight_P1_D5_thin_leak100_20": {**PATHS, **THIN},
    "hash_tree_P2_D9_leak100_20": {"kind": "hash_tree", **DENSE_START, **LARGE},
    "tree_straight_P2_D9_leak100_20": {**PATHS, **LARGE},
    "random_tree_P2_W1_leak100_20": {"kind": "random_tree", **DENSE_START},
    "moe_top4_X128_leak100_20": {"kind": "moe", **experts(128, 4, 4), **DENSE_START},
    "moe_top16_X512_leak100_20": {"kind": "moe", **experts(512, 16, 1), **DENSE_START},
    "moe_top4_X128_sum1_leak100_20": {"kind": "moe", **experts(128, 4, 4), **SUM1, **DENSE_START},
    "moe_top16_X512_sum1_leak100_20": {"kind": "moe", **experts(512, 16, 1), **SUM1, **DENSE_START},
    "moe_top8_X256_G8_leak100_20": {"kind": "moe", **experts(256, 8, 2, 8), **DENSE_START},
    "moe_top16_X512_G16_leak100_20": {"kind": "moe", **experts(512, 16, 1, 16), **DENSE_START},
    "moe_top16_X512_G16_norm2_leak100_20": {
        "kind": "moe", **NORM2, **experts(512, 16, 1, 16), **DENSE_START,
    },
    "tree_continuous_P16_D5_experts_norm2_beam2_leak100_20": RECIPE,
    # Twice dense's F at A = 16: trees one level deeper.
    "tree_continuous_P16_D6_experts_norm2_beam2_leak100_20": {**RECIPE, **apart(16, 1, 6, 0)},
    # Four times dense's F at A = 16: trees two levels deeper, mixtures of four times the experts.
    "tree_continuous_P16_D7_experts_norm2_leak100_20": {**EXPERTS, **apart(16, 1, 7, 0)},
    "moe_top4_X512_sum1_leak100_20": {"kind": "moe", **experts(512, 4, 4), **SUM1, **DENSE_START},
    "moe_top8_X1024_norm2_leak100_20": {"kind": "moe", **experts(1024, 8, 2), **NORM2, **DENSE_START},
    # Without the dense start.
    "moe_top4_X128_sum1": {"kind": "moe", **experts(128, 4, 4), **SUM1},
    "tree_continuous_P16_D5_experts_norm2_beam2": {**RECIPE, "ffn.leak": 0.0},
    # Trees in one of the two layers, a dense one of as many units at work in the other.
    "tree_continuous_P16_D5_experts_norm2_beam2_below_narrow_leak100_20": {
        **RECIPE, "model.layers": "tree,narrow",
    },
    "tree_continuous_P16_D5_experts_norm2_beam2_above_narrow_leak100_20": {
        **RECIPE, "model.layers": "narrow,tree",
    },
    # The same with all units in store in the first layer, and what the dense layer is worth there and above.
    "tree_continuous_P16_D6_experts_norm2_beam2_below_narrow_leak100_20": {
        **RECIPE, **apart(16, 1, 6, 0), "model.layers": "tree,narrow",
    },
    "plain_dense_below_narrow": {"model.layers": "dense,narrow"},
    "plain_dense_above_narrow": {"model.layers": "narrow,dense"},
    # Another warm-up, and a longer memory of squared gradients, in every kind.
    "tree_continuous_P16_D5_experts_norm2_beam2_leak100_20_warmup30": {**RECIPE, "optim.warmup": 300},
    "b2_99_dense": {"kind": "dense", **B2_99},
    "b2_99_narrow_A16": {"kind": "narrow", **B2_99},
    "moe_top4_X128_sum1_leak100_20_b2_99": {
        "kind": "moe", **experts(128, 4, 4), **SUM1, **DENSE_START, **B2_99,
    },
    "tree_continuous_P16_D5_experts_norm2_beam2_leak100_20_b2_99": {**RECIPE, **B2_99},
    "b2_999_dense": {"kind": "dense", **B2_999},
    "b2_999_narrow_A16": {"kind": "narrow", **B2_999},
    "moe_top4_X128_sum1_leak100_20_b2_999": {
        "kind": "moe", **experts(128, 4, 4), **SUM1, **DENSE_START, **B2_999,
    },
    "tree_continuous_P16_D5_experts_norm2_beam2_leak100_20_b2_999": {**RECIPE, **B2_999},
    # A quarter of the units at work.
    "plain_A128": {"kind": "narrow", **plain(128)},
    "moe_top4_X16_sum1_leak100_20": {"kind": "moe", **experts(16, 4, 32), **SUM1, **DENSE_START},
    "tree_continuous_P128_D2_experts_norm2_beam2_leak100_20": {**RECIPE, **apart(128, 1, 2, 0)},
    # Units of another activation, in every kind.
    "relu2_dense": {"kind": "dense", **RELU2},
    "relu2_narrow_A16": {"kind": "narrow", **RELU2},
    "moe_top4_X128_sum1_relu2_leak100_20": {
        "kind": "moe", **experts(128, 4, 4), **SUM1, **DENSE_START, **RELU2,
    },
    "tree_continuous_P16_D5_experts_norm2_beam2_relu2_leak100_20": {**RECIPE, **RELU2},
    "tree_continuous_P2_W1_leak100_20": {"ffn.routing": "continuous", **DENSE_START},
    "tree_continuous_P2_W1_gated_leak100_20": {**GATED, **DENSE_START},
    "tree_continuous_P2_W1_apart_gated_leak100_20": APART,
    "tree_continuous_P2_W1_apart_hash4_gated_leak100_20": {**APART, **apart(2, 1, 7, hashed=4)},
    "tree_continuous_P4_D5_experts_leak100_20": {**GATED, **apart(4, 4, 5, 0), **DENSE_START},
    "tree_continuous_P8_D5_experts_leak100_20": {**GATED, **apart(8, 2, 5, 0), **DENSE_START},
    "tree_continuous_P16_D5_experts_leak100_20": {**GATED, **apart(16, 1, 5, 0), **DENSE_START},
    "tree_continuous_P4_D5_experts_sum1_leak100_20": {**GATED, **SUM1, **apart(4, 4, 5, 0), **DENSE_START},
    "tree_continuous_P16_D5_experts_sum1_leak100_20": {**GATED, **SUM1, **apart(16, 1, 5, 0), **DENSE_START},
    "moe_top4_X128_norm2_leak100_20": {"kind": "moe", **experts(128, 4, 4), **NORM2, **DENSE_START},
    "tree_continuous_P4_D5_experts_norm2_leak100_20": {**EXPERTS, **apart(4, 4, 5, 0)},
    "tree_continuous_P16_D5_experts_norm2_leak100_20": {**EXPERTS, **apart(16, 1, 5, 0)},
    "tree_continuous_P16_D5_experts_even_leak100_20": {**GATED, **EVEN, **apart(16, 1, 5, 0), **DENSE_START},
    "tree_continuous_P16_D5_experts_even10_leak100_20": {
        **GATED, **EVEN, **apart(16, 1, 5, 0), **DENSE_START, "ffn.balance_rate": 1e-2,
    },
    "tree_continuous_P16_D5_experts_kappa2_leak100_20": {
        **GATED, **apart(16, 1, 5, 0), **DENSE_START, "ffn.kappa": 2.0,
    },
    "tree_continuous_P16_D5_experts_kappa4_leak100_20": {
        **GATED, **apart(16, 1, 5, 0), **DENSE_START, "ffn.kappa": 4.0,
    },
    "tree_straight_P2_W1_hash2_leak100_20": {**PATHS, "ffn.hash_levels": 2},
    "tree_straight_P2_W1_hash4_leak100_20": {**PATHS, **HASH4},
    "tree_straight_P2_W1_below_hash_leak100_20": {**PATHS, "model.layers": "tree,hash_tree"},
    "tree_straight_P2_W1_above_hash_leak100_20": {**PATHS, "model.layers": "hash_tree,tree"},
    "tree_straight_P2_W1_leak100_20_beta4": {**PATHS, "ffn.beta": 4.0},
    "tree_straight_P2_W1_leak100_20_beta025": {**PATHS, "ffn.beta": 0.25},
}  # fmt: skip


def get_sweep(arg=None):
    """The sweep as plain data. Argument: seeds."""
    arg = common.parse_arg(arg, seeds=1)
    return {
        "config": "configs/quickstart.py",
        "table": "quality_attempts",
        "seeds": list(range(arg.seeds)),
        "rows": {name: {"set": {**PLAIN, **row}} for name, row in ROWS.items()},
    }
