"""From a config to a model, with a sentence for every mistake; sizes without memory."""

import time

import jax
import pytest

from configs import default
from tree_ffn import recipe
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec
from tree_ffn.models.cost import abstract_variables, describe, sizes
from tree_ffn.models.from_config import KINDS, PRESETS, layer_kinds, model_spec_from_config
from tree_ffn.training.plan import settled
from tree_ffn.tree import LeafSpec, TreeSpec


def build(arg="preset=nano", **changes):
    config = default.get_config(arg)
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return model_spec_from_config(config, vocab_size=257)


def test_kinds_share_the_units_of_the_leaf_fields():
    dense, narrow, leaf, tree, random_tree = (build(f"preset=opt_125m,kind={kind}").ffns[0] for kind in KINDS)
    assert dense == DenseSpec(3072) and narrow == DenseSpec(96)
    assert leaf == recipe(768)
    assert isinstance(tree, TreeSpec) and tree.shape.node_width == 12 and tree.routing == "hard"
    assert random_tree.router == "frozen" and random_tree.routing == "hard"
    assert random_tree.shape == tree.shape
    assert build("preset=nano,kind=dense", ffn__width=100).ffns[0] == DenseSpec(100)


def test_a_flat_router_is_a_mixture_of_experts():
    spec = build("preset=nano", ffn__router="softmax", ffn__n_experts=32, ffn__top_k=2, ffn__gate_norm="l1")
    mixture = LeafSpec(
        n_experts=32, expert_width=1, top_k=2, router="softmax", gate_norm="l1", dense_start=0.2
    )
    assert spec.ffns == (mixture,) * 4 and "router softmax, gates l1" in describe(spec)[0]


def test_layers_may_differ():
    spec = build(model__layers="dense, tree*2,leaf")
    assert [type(ffn) for ffn in spec.ffns] == [DenseSpec, TreeSpec, TreeSpec, LeafSpec]
    assert len(spec.runs) == 3
    assert layer_kinds("", 2, "leaf") == ("leaf", "leaf")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__width": 130}, "model.width: 130 is not allowed; it must be a multiple of n_heads = 4"),
        ({"model__n_heads": 0}, "model.n_heads: 0"),
        ({"model__n_layers": 0}, "model.n_layers: 0"),
        ({"model__max_seq_len": -1}, "model.max_seq_len: -1"),
        ({"model__dtype": "int8"}, "model.dtype: 'int8' is not known; use one of: float32, bfloat16"),
        (
            {"model__layers": "dense,tre"},
            "model.layers: 'tre' is not known; use one of: dense, narrow, leaf,",
        ),
        ({"model__layers": "tree*2"}, "model.layers: 'tree.2' names 2 layers, but model.n_layers is 4"),
        ({"model__layers": "tree*x"}, "model.layers: 'tree.x' is not allowed; write a kind and a count"),
        ({"ffn__kind": "mlp"}, "ffn.kind: 'mlp' is not known; use one of: dense, narrow, leaf, tree,"),
        ({"ffn__activation": "swish"}, "ffn.activation: 'swish' is not known; use one of: gelu, gelu_tanh,"),
        (
            {"ffn__kind": "tree", "ffn__routing": "soft"},
            "ffn.routing: 'soft' is not known; use one of: hard,",
        ),
        ({"ffn__n_trees": 0}, "ffn.n_trees: 0"),
        ({"ffn__kind": "tree", "ffn__depth": -1}, "ffn.depth: -1"),
        (
            {"ffn__kind": "tree", "ffn__node_width": (1, 2)},
            "ffn.node_width: .1, 2. has 2 widths; depth 7 has 8 levels",
        ),
        (
            {"ffn__implementation": "fast"},
            "ffn.implementation: 'fast' is not known; use one of: auto, masked,",
        ),
        ({"ffn__top_k": 640}, "ffn.top_k: 640 is not allowed; a token can use at most"),
        ({"ffn__dense_start": 1.5}, "ffn.dense_start: 1.5 is not allowed; use a number from 0 to 1"),
    ],
)
def test_mistakes_name_the_field(changes, words):
    with pytest.raises(InputError, match=f"^{words}"):
        build(**changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_described_without_memory(preset):
    started = time.perf_counter()
    page, numbers = describe(build(f"preset={preset}"))
    assert time.perf_counter() - started < 10  # well under a second on an idle machine
    assert numbers["active_share"] == 0.03125
    assert f"{numbers['parameters']:,}" in page


def test_sizes_of_opt():
    """With OPT's vocabulary and dense layers of 4 E units the parameter counts are OPT's own."""
    for preset, size in (("opt_125m", 125e6), ("opt_1.3b", 1.3e9), ("opt_2.7b", 2.7e9), ("opt_6.7b", 6.7e9)):
        config = default.get_config(f"preset={preset},kind=dense")
        config.ffn.width = 4 * settled(config).model.width
        assert abs(sizes(model_spec_from_config(config, 50272))["parameters"] / size - 1) < 0.025


def test_sizes_count_what_is_there():
    spec = build(model__layers="dense,tree*2,leaf")
    numbers, variables = sizes(spec), abstract_variables(spec)
    held = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in variables.items()}
    assert numbers["parameters"] == held["params"] and numbers["parameters_routing"] == held["routing"]
    width, active = 128, 512 + 2 * 16 + 16
    assert numbers["active_units"] == active
    assert numbers["flops_ffn"] == 4 * width * active + 2 * 95 * width
    assert (
        numbers["flops_model"] - numbers["flops_ffn"]
        == 4 * (8 * width**2 + 2 * width * 129) + 2 * width * 257
    )
    assert numbers["bytes_weights"] == 4 * (held["params"] + held["routing"])
