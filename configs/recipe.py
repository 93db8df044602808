"""The recommended layer: single units that trees of gated decisions find, and a training that begins dense.

    python -m experiments.train --config=configs/recipe.py --workdir=runs/mine
    python -m experiments.train --config=configs/recipe.py:preset=opt_125m --config.model.dtype=bfloat16 \\
        --config.data.files='TEXT/*.txt.xz' --config.data.tokenizer=tokenizer.json --workdir=runs/125m
    python -m experiments.train --config=configs/recipe.py:kind=narrow --workdir=runs/narrow    # a baseline

`EXPERTS`: E / 8 trees of depth 5. A deciding node is a router and no unit; the units are in the leaves, one
each: F = 4 E, A / F = 1 / 32. A token's units weigh the product of the probabilities of its decisions
(`routing=continuous`, `openness=logistic`, `gate=product`), so that decisions learn, over the root of the sum
of the squares of these (`renormalise`, `gate_norm=2`). Its leaf is the likeliest that a search finds which
keeps two nodes of every level (`beam=2`). The routers' 9 E / 8 products a token are not in A; stored they are
half as many numbers as the units. `--config.ffn.beam=1` goes down node by node, for 5 E / 8 products; E / 16
or E / 32 trees, with leaves of two or four units, halve or quarter them and what is stored. Each closes less.
`--config.ffn.depth=6` doubles F at the same A, for one more router a tree, two with the beam.

The dense start: for the first fifth of the training units off the path add a share of what they are, from all
of it down to nothing (`ffn.leak`, `ffn.leak_share`): decisions are learned while the units below them already
are. After that, and whenever the model is used, a token has its paths and nothing else.

Evidence (docs/quality.md; T1-small, 60 M tokens, three seeds): it closes 0.95 +- 0.03 of the gap between
narrow and dense, and 0.91 +- 0.01 without the beam; at depth 6, with twice dense's units and the same A,
1.00 +- 0.03 (without the beam 0.97 +- 0.01; depth 7, four times, 0.96, one seed). A start of half the
length closes 0.93 +- 0.05. At 120 M tokens it closes 0.75, at depth 6 0.85 (one seed). All that follows is
without the beam: E / 16 trees over leaves of two close 0.88 +- 0.02; without the norm E / 32 over leaves of
four 0.83 +- 0.03, and these without the dense start 0.36 (one seed). From the same start mixtures of
experts close 0.69 +- 0.02 (top-1) and 0.76 +- 0.03 (top-4; 0.90 +- 0.04 where the chosen gates sum to 1,
0.91 +- 0.02 for top-12 of 384 in gates of unit length, 0.92 +- 0.05 for top-12 of 768, of depth 6's F),
hashed experts 0.76 +- 0.03, and `PATHS` 0.72 +- 0.03: the paper's shape, E / 64 trees of depth 7 with one
unit a node, its decisions straight-through. With these taken by a hash of the token's id (`kind=hash_tree`)
it is 0.83 +- 0.04, but behind on text unlike that of training. The paper's hard rule without the start
closes 0.24 +- 0.04.
"""

from configs import common

DENSE_START = {"leak": 1.0, "leak_share": 0.2}
EXPERTS = {
    "routing": "continuous", "openness": "logistic", "gate": "product", "router": "silent",
    "renormalise": True, "gate_norm": 2, "beam": 2, "depth": 5, "node_width": (1,),
}  # fmt: skip
# The mixture to compare with: the best of top-1 and top-4 from the same start.
MIXTURE = {"n_experts": 128, "top_k": 4, "renormalise": True, "gate_norm": 1}
# One tree over E / 128 units a leaf, of which a token takes the 16 likeliest that a beam finds.
LEAVES = {"n_experts": 512, "top_k": 16, "search": "beam"}
PATHS = {"routing": "straight_through", "depth": 7, "node_width": (1,)}
# Kinds of trees whose decisions are not learned: they have `PATHS`, since `EXPERTS` has routers to learn.
UNLEARNED = ("hash_tree", "random_tree")


def layer_of(kind):
    """The layer that a kind of feed-forward layers is given, or has the units of."""
    return PATHS if kind in UNLEARNED else EXPERTS


def set_layer(config, kind="tree", layer=None):
    """Makes a config's feed-forward layers the recommended ones, or of another kind with their F and A.

    Args:
      config: of configs/common.py.
      kind: of the layers.
      layer: EXPERTS or PATHS; None: that of the kind, `layer_of`.
    """
    layer = layer or layer_of(kind)
    ffn = config.ffn
    own = {"moe": MIXTURE, "leaf": LEAVES}.get(kind, {}) if layer is EXPERTS else {}
    for key, value in {**layer, **DENSE_START, **own}.items():
        ffn[key] = value
    across = 8 if layer is EXPERTS else 64
    ffn.n_trees = common.follow(1, lambda width: max(1, width // across), config.model.get_ref("width"))
    ffn.kind = kind


def get_config(arg=None):
    """Arguments: preset (configs/presets.py), kind (of the feed-forward layers), seed."""
    arg = common.parse_arg(arg, preset="", kind="tree", seed=0)
    config = common.base_config()
    config.seed = arg.seed
    config.model.preset = arg.preset
    set_layer(config, arg.kind)
    return config
