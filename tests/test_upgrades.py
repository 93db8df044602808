"""Configs of any version mean what was computed when they were recorded."""

import copy

import pytest

from configs import default
from tests.models.kinds import KINDS, model_spec
from tree_ffn.errors import InputError
from tree_ffn.models import spec_from_dict, spec_to_dict
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.plain import flat, namespace
from tree_ffn.training.plan import resolved
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec
from tree_ffn.upgrades import ADDED, KEY, REMOVED, VERSION, readable, stamped, upgraded

# Section `ffn` as it was recorded on 2026-11-30, with every key that had come by then.
OLD_FFN = {
    "act_site": "node", "activation": "gelu", "aux_weight": 0.01, "balance": "none", "balance_rate": 1e-3,
    "beam": 1, "beta": 1.0, "depth": 2, "expert_groups": 1, "expert_width": 0, "gate": "min", "gate_norm": 1,
    "hash_levels": 0, "implementation": "auto", "kappa": 1.0, "leaf_router": "tree", "leaf_trees": 1,
    "leak": 0.0, "leak_share": 0.3, "moe_balance": "bias", "n_experts": 8, "n_trees": 3, "node_width": [2],
    "openness": "exponential", "renormalise": False, "router": "first_unit", "routing": "hard",
    "search": "best", "shared_width": 0, "top_k": 2, "width": 0,
}  # fmt: skip


def old_config(kind="tree", **changes):
    """As it was recorded before any of the keys was added that had a default."""
    config = resolved(default.get_config("preset=nano"))
    config["ffn"] = OLD_FFN | {"kind": kind}
    for section, values in ADDED.items():
        for name in values:
            config[section].pop(name, None)
    config["ffn"] |= changes
    return config


# What was computed then, in literal values: no default of today says it.
ALIKE = {"implementation": "auto", "activation": "gelu"}
TREES = {"n_trees": 3, "depth": 2, "node_width": [2], "act_site": "node", "balance_rate": 0.0}
LEAVES = {
    "kind": "leaf", "n_experts": 8, "top_k": 2, "n_trees": 1, "gate_norm": "none", "balance_rate": 1e-3,
    "dense_start": 0.0, "expert_width": 9,
}  # fmt: skip
MEANT = [
    ("tree", {}, {"kind": "tree", "routing": "hard", **TREES}),
    ("tree", {"balance": "sign"}, {"kind": "tree", "routing": "hard", **TREES, "balance_rate": 1e-3}),
    ("random_tree", {"routing": "continuous"}, {"kind": "random_tree", "routing": "hard", **TREES}),
    ("dense", {}, {"kind": "dense", "width": 42}),
    ("narrow", {"shared_width": 5}, {"kind": "narrow", "width": 23}),
    ("moe", {}, {**LEAVES, "router": "softmax"}),
    (
        "moe",
        {"renormalise": True, "gate_norm": 2, "leak": 1.0, "leak_share": 0.2, "expert_width": 4},
        {**LEAVES, "router": "softmax", "gate_norm": "l2", "dense_start": 0.2, "expert_width": 4},
    ),
    (
        "hash",
        {},
        {**LEAVES, "router": "hash", "top_k": 1, "balance_rate": 0.0, "expert_width": 18},
    ),
    (
        "leaf",
        {"leaf_trees": 2, "search": "beam", "renormalise": True, "gate_norm": 3, "moe_balance": "none"},
        {
            **LEAVES, "router": "tree", "n_trees": 2, "gate_norm": "rms", "balance_rate": 0.0,
        },
    ),
    ("leaf", {"leaf_router": "softmax"}, {**LEAVES, "router": "softmax"}),
    # A beam of 4 keeps every node above 8 leaves: it finds the best.
    ("leaf", {"top_k": 4}, {**LEAVES, "router": "tree", "top_k": 4, "expert_width": 4}),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, meant", MEANT)
def test_what_was_computed_then_is_fixed(kind, changes, meant):
    found = readable(old_config(kind, **changes), "runs/a")
    assert found["ffn"] == ALIKE | meant
    assert (found["model"]["unroll"], found["train"]["probe"], found[KEY]) == (1, False, VERSION)
    model_spec_from_config(namespace(found), 257)


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("tree", {"routing": "continuous"}, "ffn.routing = 'continuous'"),
        ("tree", {"hash_levels": 1}, "ffn.hash_levels = 1"),
        ("tree", {"leak": 0.5}, "ffn.leak = 0.5"),
        ("tree", {"router": "silent", "routing": "straight_through"}, "ffn.router = 'silent'"),
        ("tree", {"shared_width": 6}, "ffn.shared_width = 6"),
        ("tree", {"routing": "straight_through", "beta": 4.0}, "ffn.beta = 4.0"),
        ("hash_tree", {}, "ffn.kind = 'hash_tree'"),
        ("moe", {"expert_groups": 2}, "ffn.expert_groups = 2"),
        ("moe", {"moe_balance": "aux"}, "ffn.moe_balance = 'aux'"),
        ("moe", {"leak": 0.5}, "ffn.leak = 0.5"),
    ],
)
def test_what_no_layer_computes_any_more_is_kept_and_refused(kind, changes, said):
    config = old_config(kind, **changes)
    kept = upgraded(config)["ffn"]
    assert all(kept[name] == value for name, value in changes.items())  # rows are told apart by it
    gone = "is no option any more; the last commit that reads it is"
    with pytest.raises(InputError, match=rf"^runs/a: {said} {gone} 30983ff\.$"):
        readable(config, "runs/a")


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 3}, {"leaf_trees": 4, "top_k": 3}, {"leaf_trees": 8, "top_k": 7}, {"top_k": 1}]
)
def test_the_best_of_all_leaves_are_kept_apart_and_refused(changes):
    config = old_config("leaf", **changes)
    assert upgraded(config)["ffn"]["search"] == "best"  # rows are told apart by it
    said = "ffn.search = 'best' is no option any more; the last commit that reads it is 389f439"
    with pytest.raises(InputError, match=rf"^runs/a: {said}\.$"):
        readable(config, "runs/a")
    with pytest.raises(InputError, match=r"ffn.leak = 0.5 is .*30983ff\.$"):
        readable(old_config("leaf", leak=0.5, **changes), "runs/a")


def test_values_that_are_there_stay_and_nothing_is_changed_in_place():
    config = old_config(leak=0.5)
    before = copy.deepcopy(config)
    assert upgraded(config)["ffn"]["leak"] == 0.5 and config == before
    assert upgraded(upgraded(config)) == upgraded(config)
    now = stamped(resolved(default.get_config()))
    assert upgraded(now) == now


def test_sections_that_are_not_there_do_not_come():
    assert upgraded({"tokens": 8, "spec": {"depth": 3}}) == {"tokens": 8, "spec": {"depth": 3}, KEY: VERSION}


@pytest.mark.parametrize("kind", ["tree", "moe", "hash", "leaf", "dense"])
def test_a_damaged_section_is_left_as_it_is(kind):
    for name in OLD_FFN:
        config = old_config(kind, **{key: OLD_FFN[key] for key in ADDED["ffn"]})
        del config["ffn"][name]
        assert upgraded(config)[KEY] == VERSION


GONE = [
    ("ffn.balance_floor", 0.5, 0.2),
    ("optim.routers_until", 1.0, 0.2),
    ("ffn.negative_slope", 0.01, 0.2),
    ("train.z_loss", 0.0, 0.1),
]


@pytest.mark.parametrize("key, neutral, used", GONE)
def test_an_option_that_is_gone_is_dropped_where_it_changed_nothing(key, neutral, used):
    section, name = key.split(".")
    activation = {"ffn.negative_slope": "leaky_relu"}.get(key, "gelu")
    config = old_config(activation=activation)
    plain = upgraded(config)
    config[section][name] = neutral
    assert key not in flat(upgraded(config)) and upgraded(config) == plain
    config[section][name] = used
    assert flat(upgraded(config))[key] == used  # rows are told apart by it
    gone = "is no option any more; the last commit that reads it is"
    with pytest.raises(InputError, match=rf"^runs/a: {key} = {used} {gone} {REMOVED[key]}\.$"):
        readable(config, "runs/a")


def test_a_slope_that_nothing_used_is_dropped():
    config = old_config()
    config["ffn"]["negative_slope"] = 0.2  # of gelu
    assert readable(config, "runs/a") == upgraded(old_config())


def test_every_option_that_is_gone_is_tried():
    assert {key for key, _, _ in GONE} == set(REMOVED)


@pytest.mark.parametrize("version", [VERSION + 1, -1, "1", True, None, 1.0])
def test_versions_that_are_not_known_are_refused(version):
    with pytest.raises(InputError, match=f"config_version: .* is not known; use one from 0 to {VERSION}"):
        upgraded(old_config() | {KEY: version})


OLD_LAYER = {
    "kind": "tree", "shape": {"n_trees": 2, "depth": 2, "node_width": 1, "shared_width": 0},
    "activation": "gelu", "negative_slope": 0.01, "act_site": "node", "routing": "continuous", "gate": "min",
    "kappa": 1.0, "beta": 1.0, "balance": "none", "balance_rate": 1e-3, "router": "first_unit",
}  # fmt: skip
OLD_MODEL = {
    "vocab_size": 9, "context": 8, "width": 4, "n_layers": 1, "n_heads": 1, "implementation": None,
    "dtype": "float32", "param_dtype": "float32", "remat": False, "norm_eps": 1e-5, "vocab_multiple": 1,
    "scan": True, "init": {"embed": 0.05, "attn_in": 1.0, "attn_out": 0.1, "w_in": 0.7, "w_out": 0.05},
}  # fmt: skip


def test_models_of_old_exports():
    """As the first exports wrote them."""
    hard = OLD_LAYER | {"routing": "hard"}
    spec = spec_from_dict({**OLD_MODEL, "ffns": [hard]})
    assert spec.ffns == (TreeSpec(TreeShape(2, 2, 1)),) and (spec.unroll, spec.tied_head) == (1, True)
    with pytest.raises(InputError, match=r"model: ffn.balance_floor = 0.2 is no option any more"):
        spec_from_dict({**OLD_MODEL, "ffns": [hard | {"balance_floor": 0.2}]})
    assert spec_from_dict({**OLD_MODEL, "ffns": [hard | {"balance_floor": 0.5}]}) == spec
    with pytest.raises(InputError, match=r"model: ffn.routing = 'continuous' is no option any more"):
        spec_from_dict({**OLD_MODEL, "ffns": [OLD_LAYER]})


def test_mixtures_of_old_exports_are_leaf_layers():
    mixture = {
        "kind": "moe", "n_experts": 8, "expert_width": 3, "top_k": 2, "renormalise": True, "balance": "bias",
        "balance_rate": 1e-3, "aux_weight": 0.01, "activation": "gelu", "router": "softmax",
        "expert_groups": 1, "gate_norm": 2, "leak": 1.0, "leak_share": 0.2,
    }  # fmt: skip
    spec = spec_from_dict({**OLD_MODEL, "ffns": [mixture]})
    assert spec.ffns == (
        LeafSpec(
            n_experts=8, expert_width=3, top_k=2, router="softmax", gate_norm="l2", balance_rate=1e-3,
            dense_start=0.2,
        ),
    )  # fmt: skip
    hashing = mixture | {"router": "hash", "top_k": 1, "balance": "none", "leak": 0.0}
    spec = spec_from_dict({**OLD_MODEL, "ffns": [hashing]})
    assert spec.ffns == (LeafSpec(n_experts=8, expert_width=3, top_k=1, router="hash", gate_norm="none"),)


@pytest.mark.parametrize("search, top_k, reads", [("beam", 3, True), ("best", 4, True), ("best", 3, False)])
def test_trees_of_leaves_of_old_exports_were_searched(search, top_k, reads):
    layer = {
        "kind": "leaf", "n_experts": 8, "expert_width": 3, "top_k": top_k, "router": "tree", "n_trees": 1,
        "search": search, "gate_norm": "l2", "balance_rate": 0.0, "dense_start": 0.0, "activation": "gelu",
        "n_kept": 0,
    }  # fmt: skip
    model = {**OLD_MODEL, "ffns": [layer], "unroll": 1, "tied_head": True, KEY: 5}
    if reads:
        assert spec_from_dict(model).ffns == (LeafSpec(n_experts=8, expert_width=3, top_k=top_k),)
    else:
        with pytest.raises(InputError, match="model: ffn.search = 'best' is no option any more; .* 389f439"):
            spec_from_dict(model)


def test_of_a_layer_that_was_timed_the_search_goes_too():
    spec = {"n_experts": 8, "top_k": 2, "router": "tree", "n_trees": 1}
    timed = lambda search: {KEY: 5, "spec": spec | {"search": search}}
    assert upgraded(timed("beam")) == {KEY: VERSION, "spec": spec}
    assert upgraded(timed("best"))["spec"]["search"] == "best"


@pytest.mark.parametrize("name", ["hard", "leaf_softmax", "dense"])
def test_no_default_says_what_a_model_means(name):
    values = spec_to_dict(model_spec(KINDS[name]))
    assert values[KEY] == VERSION
    for place in (values, values["ffns"][0], values["init"]):
        for field in [field for field in place if field not in (KEY, "kind")]:
            kept = place.pop(field)
            with pytest.raises(InputError):
                spec_from_dict(values)
            place[field] = kept
    assert spec_from_dict(values) == model_spec(KINDS[name])


@pytest.mark.parametrize("ffns", [None, 3, [3], [{"kind": ["tree"]}], [{"kind": "tree", "shape": 3}]])
def test_layers_that_are_none_do_not_stop_an_upgrade(ffns):
    assert upgraded({**OLD_MODEL, "ffns": ffns})[KEY] == VERSION


def test_models_of_fine_tuned_rows_are_upgraded_too():
    row = {"model": {**OLD_MODEL, "ffns": [OLD_LAYER]}, "train": {"probe": True}, "seed": 0}
    assert upgraded(row)["model"] == upgraded(row["model"])
    assert upgraded(row | {KEY: VERSION})["model"]["unroll"] == 1


def test_the_format_of_prepared_rows_tells_no_runs_apart():
    config = old_config()
    config["data"]["format"] = "array_record"
    assert upgraded(config) == upgraded(old_config()) and "data.format" not in flat(upgraded(config))


@pytest.mark.parametrize("was, name", [(True, "full"), (False, "none")])
def test_what_was_recomputed_has_a_name(was, name):
    config = old_config()
    config["model"]["remat"] = was
    assert upgraded(config)["model"]["remat"] == name
    model = {**OLD_MODEL, "ffns": [OLD_LAYER | {"routing": "hard"}], "remat": was}
    assert spec_from_dict(model).remat == name == upgraded({"model": model})["model"]["remat"]
