"""Every config file loads, says everything, and describes a model that can be built."""

import importlib
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

import configs
import tree_ffn
from configs import common, default, quickstart, recipe
from tree_ffn.data import corpus_spec_from_config
from tree_ffn.errors import InputError
from tree_ffn.models import active_units
from tree_ffn.models.cost import abstract_variables
from tree_ffn.models.from_config import KINDS, PRESETS, model_spec_from_config
from tree_ffn.training.plan import optim_spec, plan_run, resolved, settled

DIRECTORY = pathlib.Path(configs.__file__).parent
FILES = sorted(path.stem for path in DIRECTORY.glob("*.py"))
RUNS = [name for name in FILES if name not in ("__init__", "common")]


@pytest.mark.parametrize("name", RUNS)
def test_every_config_makes_a_model(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    own = {"finetune"} if name == "finetune" else set()
    assert set(config) == set(common.base_config()) | own, "a config file sets values, it adds no sections"
    for section, values in common.base_config().items():
        if isinstance(values, ConfigDict):
            assert set(config[section]) == set(values)
    assert jax.tree.leaves(abstract_variables(model_spec_from_config(config, 257)))


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_steps_just_works(name):
    """The warm-up is a share of the steps until it is set."""
    config = importlib.import_module(f"configs.{name}").get_config()
    assert optim_spec(config).warmup > 0
    for steps in (3, 30):
        config.train.steps = steps
        share = int(config.optim.warmup_share * steps)
        assert optim_spec(config).warmup == (2 if name == "smoke" else share) <= max(2, steps // 8)
        assert settled(config).optim.warmup_steps == optim_spec(config).warmup
    config.optim.warmup_steps = 7
    config.train.steps = 70
    assert settled(config).optim.warmup_steps == optim_spec(config).warmup == 7


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_an_argument(kind):
    assert default.get_config(f"kind={kind}").ffn.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_quickstart_has_all_kinds(kind):
    ffn = model_spec_from_config(quickstart.get_config(f"kind={kind}"), 257).ffns[0]
    assert active_units(ffn) == (512 if kind == "dense" else 16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_of_the_recipe_have_its_units(kind):
    config = recipe.get_config(f"kind={kind}")
    config.model.width = 768
    ffn = model_spec_from_config(config, 257).ffns[0]
    assert active_units(ffn) == (3072 if kind == "dense" else 96)
    assert kind != "leaf" or ffn == tree_ffn.recipe(768)


def test_sizes_follow_the_preset_until_they_are_set():
    config = default.get_config()
    config.lock()
    sizes = lambda: (
        settled(config).model.n_layers,
        settled(config).model.width,
        settled(config).ffn.node_width,
    )
    assert sizes() == (6, 256, (4,))
    config.model.preset = "opt_1.3b"
    assert sizes() == (24, 2048, (32,)) and settled(config).model.max_seq_len == 2048
    config.model.width = 1024
    assert sizes() == (24, 1024, (16,)) and settled(config).ffn.expert_width == 8
    config.ffn.node_width = (1, 1, 1, 1, 1, 1, 1, 64)
    config.model.preset = "nano"
    assert sizes() == (4, 1024, (1, 1, 1, 1, 1, 1, 1, 64))
    assert resolved(config)["model"]["n_layers"] == 4  # what is recorded is plain


@pytest.mark.parametrize("name", ["cpu_small", "demo_30m", "t1", "t1_small", "t2_1p3b", "t4_small"])
def test_configs_that_need_text_have_no_default_text(name):
    """They are refused without, take what is named, and the embedded corpus if it is asked for."""
    make = lambda: importlib.import_module(f"configs.{name}").get_config()
    with pytest.raises(InputError, match="^data.files: '' is not allowed .*data.corpus=python_stdlib"):
        plan_run(make())
    for field, value, corpus in (
        ("files", "a.txt", "files"), ("tfds_name", "b", "tfds"), ("corpus", "python_stdlib", "python_stdlib")
    ):  # fmt: skip
        config = make()
        config.data[field] = value
        assert corpus_spec_from_config(config).corpus == corpus
    assert corpus_spec_from_config(quickstart.get_config()).corpus == "python_stdlib"


def test_an_unknown_preset_is_refused():
    for config in (default.get_config("preset=opt"), make_config_of("opt")):
        with pytest.raises(InputError, match="^model.preset: 'opt' is not known; use one of: nano, micro, "):
            model_spec_from_config(config, 257)
    assert list(PRESETS)[-5:] == ["opt_125m", "opt_350m", "opt_1.3b", "opt_2.7b", "opt_6.7b"]


def make_config_of(preset):
    config = common.base_config()
    config.model.preset = preset
    return config


@pytest.mark.parametrize(
    "arg, words",
    [
        (
            "kinds=tree",
            "config argument: 'kinds=tree' is not known; use key=value of: preset=, kind=leaf, seed=0",
        ),
        ("seed", "config argument: 'seed' is not known"),
        ("seed=x", "config argument: seed=x is not allowed; use a value of type int"),
        ("seed=1,seed=2", "config argument: 'seed' is given twice"),
        ("seed=1,", "config argument: '' is not known"),
    ],
)
def test_the_argument_is_read_strictly(arg, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        default.get_config(arg)


def test_argument_types():
    values = common.parse_arg("a=2,b=0.5,c=true,d=x", a=1, b=1.0, c=False, d="")
    assert values.to_dict() == {"a": 2, "b": 0.5, "c": True, "d": "x"}
    with pytest.raises(ValueError, match="c=yes is not allowed; use true or false"):
        common.parse_arg("c=yes", c=False)


@pytest.mark.parametrize("name", ["cpu_small", "t1", "t1_cpu", "t1_small", "t2_1p3b", "t4_cpu", "t4_small"])
def test_names_in_the_argument_are_of_a_list(name):
    key = "routing" if name.startswith("t4") else "row"
    said = f"^config argument: {key}=mlp is not known; use one of: .*dense.*[.]$"
    with pytest.raises(ValueError, match=said):
        importlib.import_module(f"configs.{name}").get_config(f"{key}=mlp")


@pytest.mark.parametrize("name", ["cpu_small", "t1", "t1_cpu", "t1_small", "t4_small"])
def test_lengths_in_the_argument_are_of_a_list(name):
    with pytest.raises(ValueError, match="^config argument: length=all is not known; use one of: full, "):
        importlib.import_module(f"configs.{name}").get_config("length=all")
