"""From a config to a model, with a sentence for every mistake; sizes without memory."""

import time

import jax
import pytest

from configs import default
from configs.presets import PRESETS
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec, MoESpec
from tree_ffn.models.build import KINDS, layer_kinds, model_spec_from_config
from tree_ffn.models.describe import abstract_variables, describe, figures
from tree_ffn.tree import Leaking, TreeSpec
from tree_ffn.tree.leaf import LeafSpec


def build(arg="preset=nano", **changes):
    config = default.get_config(arg)
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return model_spec_from_config(config, vocab_size=257)


def test_an_execution_that_a_layer_has_not_is_refused():
    with pytest.raises(InputError, match="^ffn.implementation: 'grouped' cannot execute a layer of ffn.kind"):
        build("preset=nano,kind=leaf", ffn__implementation="grouped")


def test_kinds_share_the_units_of_the_tree_fields():
    dense, narrow, moe, hashing, tree, random_tree, hash_tree, leaf = (
        build(f"preset=opt_125m,kind={kind}").ffns[0] for kind in KINDS
    )
    assert dense == DenseSpec(3060) and narrow == DenseSpec(96)
    assert isinstance(moe, MoESpec) and (moe.n_experts, moe.expert_width) == (32, 96)
    assert leaf == LeafSpec(n_experts=32, expert_width=96, top_k=1, gate_norm="none", balance_rate=1e-3)
    assert hashing == MoESpec(32, 96, balance="none", router="hash")
    assert isinstance(tree, TreeSpec) and tree.shape.node_width == 12 and tree.routing == "continuous"
    assert random_tree.router == "frozen" and random_tree.routing == "hard"
    assert random_tree.shape == hash_tree.shape == tree.shape
    assert hash_tree.hash_levels == 7 and hash_tree.routing == "hard"
    assert build("preset=nano,kind=dense", ffn__width=100).ffns[0] == DenseSpec(100)


@pytest.mark.parametrize("norm,said", [(1, "gates that sum to 1"), (2, "gates whose squares sum to 1")])
def test_gates_may_be_normalised(norm, said):
    for kind in ("moe", "tree"):
        spec = build(
            f"preset=nano,kind={kind}", ffn__renormalise=True, ffn__gate_norm=norm,
            ffn__routing="continuous", ffn__openness="logistic",
        )  # fmt: skip
        assert spec.ffns[0].renormalise and spec.ffns[0].gate_norm == norm and said in describe(spec)[0]


def test_a_tree_may_search_its_leaf():
    how = {"ffn__routing": "continuous", "ffn__openness": "logistic", "ffn__gate": "product", "ffn__beam": 2}
    config = "preset=nano,kind={}"
    spec = build(config.format("tree"), ffn__router="silent", **how)
    assert spec.ffns[0].beam == 2 and "a beam of 2" in describe(spec)[0]
    # One router at the root, two at every other level.
    assert spec.ffns[0].n_routers == spec.ffns[0].shape.n_trees * (2 * spec.ffns[0].shape.depth - 1)
    for kind in ("hash_tree", "random_tree", "moe", "narrow"):
        assert build(config.format(kind), **how) == build(config.format(kind), **{**how, "ffn__beam": 1})


def test_what_chooses_hard_may_leak():
    for kind in ("moe", "hash", "random_tree", "hash_tree"):
        spec = build(f"preset=nano,kind={kind}", ffn__leak=0.5, ffn__leak_share=0.2)
        ffn = spec.ffns[0]
        assert isinstance(ffn, Leaking) and (ffn.leak, ffn.leak_share) == (0.5, 0.2)
        assert "in training a leak of 0.5 until 20% are over" in describe(spec)[0]
    assert "leak" not in describe(build("preset=nano,kind=moe"))[0]
    assert build("preset=nano,kind=dense", ffn__leak=0.5) == build("preset=nano,kind=dense")


def test_layers_may_differ():
    spec = build(model__layers="dense, tree*2,dense")
    assert [type(ffn) for ffn in spec.ffns] == [DenseSpec, TreeSpec, TreeSpec, DenseSpec]
    assert len(spec.runs) == 3
    assert layer_kinds("", 2, "moe") == ("moe", "moe")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__width": 130}, "model.width: 130 is not allowed; it must be a multiple of n_heads = 4"),
        ({"model__n_heads": 0}, "model.n_heads: 0"),
        ({"model__n_layers": 0}, "model.n_layers: 0"),
        ({"model__context": -1}, "model.context: -1"),
        ({"model__dtype": "int8"}, "model.dtype: 'int8' is not known; use one of: float32, bfloat16"),
        ({"model__layers": "dense,tre"}, "model.layers: 'tre' is not known; use one of: dense, narrow, moe,"),
        ({"model__layers": "tree*2"}, "model.layers: 'tree.2' names 2 layers, but model.n_layers is 4"),
        ({"model__layers": "tree*x"}, "model.layers: 'tree.x' is not allowed; write a kind and a count"),
        ({"ffn__kind": "mlp"}, "ffn.kind: 'mlp' is not known; use one of: dense, narrow, moe, hash, tree,"),
        ({"ffn__activation": "swish"}, "ffn.activation: 'swish' is not known; use one of: gelu, gelu_tanh,"),
        ({"ffn__routing": "soft"}, "ffn.routing: 'soft' is not known; use one of: hard,"),
        ({"ffn__n_trees": 0}, "ffn.n_trees: 0"),
        ({"ffn__depth": -1}, "ffn.depth: -1"),
        ({"ffn__node_width": (1, 2)}, "ffn.node_width: .1, 2. has 2 widths; depth 7 has 8 levels"),
        ({"ffn__shared_width": -2}, "ffn.shared_width: -2"),
        (
            {"ffn__implementation": "fast"},
            "ffn.implementation: 'fast' is not known; use one of: auto, masked,",
        ),
        ({"ffn__kind": "moe", "ffn__top_k": 64}, "ffn.top_k: 64 is not allowed; a token can use at most"),
        ({"ffn__kind": "hash", "ffn__leak": -0.5}, "ffn.leak: -0.5 is not allowed; use a number from 0 to 1"),
        (
            {"ffn__kind": "moe", "ffn__moe_balance": "sign"},
            "ffn.moe_balance: 'sign' is not known; use one of",
        ),
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
    assert 0.031 < numbers["active_share"] < 0.032
    assert f"{numbers['parameters']:,}" in page


def test_sizes_of_opt():
    """With OPT's vocabulary and dense layers of 4 E units the parameter counts are OPT's own."""
    for preset, size in (("opt_125m", 125e6), ("opt_1.3b", 1.3e9), ("opt_2.7b", 2.7e9), ("opt_6.7b", 6.7e9)):
        config = default.get_config(f"preset={preset},kind=dense")
        config.ffn.width = 4 * config.model.width
        assert abs(figures(model_spec_from_config(config, 50272))["parameters"] / size - 1) < 0.025


def test_figures_count_what_is_there():
    spec = build(model__layers="dense,tree*2,moe")
    numbers, variables = figures(spec), abstract_variables(spec)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in variables.items()}
    assert numbers["parameters"] == sizes["params"] and numbers["parameters_routing"] == sizes["routing"]
    width, active = 128, 510 + 2 * 16 + 16
    assert numbers["active_units"] == active
    assert numbers["flops_ffn"] == 4 * width * active + 2 * 32 * width
    assert (
        numbers["flops_model"] - numbers["flops_ffn"]
        == 4 * (8 * width**2 + 2 * width * 129) + 2 * width * 257
    )
    assert numbers["bytes_weights"] == 4 * (sizes["params"] + sizes["routing"])
