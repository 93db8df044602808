"""Configs of any version mean what was computed when they were recorded."""

import copy
from typing import Any

import pytest

from configs import default
from tests.models.kinds import KINDS, model_spec
from tree_ffn.errors import InputError
from tree_ffn.models import spec_from_dict, spec_to_dict
from tree_ffn.models.build import model_spec_from_config
from tree_ffn.training.config import flat, namespace, resolved
from tree_ffn.upgrades import ADDED, KEY, REMOVED, VERSION, readable, stamped, upgraded


def old_config(kind="tree"):
    """As it was recorded before any of the keys was added."""
    config = resolved(default.get_config(f"preset=nano,kind={kind}"))
    for section, values in ADDED.items():
        for name in values:
            config[section].pop(name, None)
    return config


def test_what_was_computed_then_is_fixed():
    """Literal values, so that a new default of today changes none of them."""
    found = flat(upgraded(old_config()))
    assert found["ffn.openness"] == "exponential" and found["ffn.router"] == "first_unit"
    assert (found["ffn.leak"], found["ffn.hash_levels"], found["ffn.beam"], found["ffn.gate_norm"]) == (
        0,
        0,
        1,
        1,
    )
    assert (found["ffn.expert_groups"], found["ffn.leaf_trees"], found["model.unroll"]) == (1, 1, 1)
    assert found["train.probe"] is False and found[KEY] == VERSION


@pytest.mark.parametrize("kind", ["tree", "moe", "hash", "random_tree"])
def test_old_configs_make_the_model_they_made(kind):
    new = resolved(default.get_config(f"preset=nano,kind={kind}"))
    new["model"]["unroll"] = 1
    read = [model_spec_from_config(namespace(config), 257) for config in (upgraded(old_config(kind)), new)]
    assert read[0] == read[1]


def test_values_that_are_there_stay_and_nothing_is_changed_in_place():
    config = old_config()
    config["ffn"]["leak"] = 0.5
    before = copy.deepcopy(config)
    assert upgraded(config)["ffn"]["leak"] == 0.5 and config == before
    assert upgraded(upgraded(config)) == upgraded(config)
    now = stamped(resolved(default.get_config()))
    assert upgraded(now) == now


def test_sections_that_are_not_there_do_not_come():
    assert upgraded({"tokens": 8, "spec": {"depth": 3}}) == {"tokens": 8, "spec": {"depth": 3}, KEY: VERSION}


GONE = [
    ("ffn.balance_floor", 0.5, 0.2),
    ("optim.routers_until", 1.0, 0.2),
    ("ffn.negative_slope", 0.01, 0.2),
    ("train.z_loss", 0.0, 0.1),
]


@pytest.mark.parametrize("key, neutral, used", GONE)
def test_an_option_that_is_gone_is_dropped_where_it_changed_nothing(key, neutral, used):
    section, name = key.split(".")
    config = old_config()
    config[section][name] = neutral
    assert key not in flat(upgraded(config)) and upgraded(config) == upgraded(old_config())
    config[section][name] = used
    config["ffn"]["activation"] = {"ffn.negative_slope": "leaky_relu"}.get(key, "gelu")
    assert flat(upgraded(config))[key] == used  # rows are told apart by it
    with pytest.raises(
        InputError, match=rf"runs/a: {key} = {used} is no option any more; the last commit that"
    ):
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
    spec = spec_from_dict({**OLD_MODEL, "ffns": [OLD_LAYER]})
    ffn: Any = spec.ffns[0]
    assert (spec.unroll, spec.tied_head) == (1, True)
    assert (ffn.openness, ffn.hash_levels, ffn.leak, ffn.renormalise, ffn.beam) == (
        "exponential",
        0,
        0.0,
        False,
        1,
    )
    with pytest.raises(InputError, match=r"model: ffn.balance_floor = 0.2 is no option any more"):
        spec_from_dict({**OLD_MODEL, "ffns": [OLD_LAYER | {"balance_floor": 0.2}]})
    assert spec_from_dict({**OLD_MODEL, "ffns": [OLD_LAYER | {"balance_floor": 0.5}]}) == spec


@pytest.mark.parametrize("name", ["hard", "moe", "dense"])
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
