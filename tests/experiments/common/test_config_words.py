"""Words of a command line that set a config's keys: read as programs read them, or told the nearest key."""

import pathlib

import pytest

from experiments.common.config_words import config_of, unknown_key, words_of
from tree_ffn.config import make_config
from tree_ffn.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


def test_words_are_read_as_the_program_reads_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {"kind": "tree", "ffn.node_width": (1, 2), "train.probe": True, "optim.lr": 3e-5, "ffn.depth": 1}
    config = config_of(words_of("configs/smoke.py", values))
    assert (config.ffn.kind, config.ffn.node_width, config.train.probe) == ("tree", (1, 2), True)
    assert (config.optim.lr, config.ffn.depth) == (3e-5, 1)
    with pytest.raises(InputError, match="config argument: kinds=1|'kinds=1' is not known"):
        config_of(["--config=configs/smoke.py:kinds=1"])


@pytest.mark.parametrize(
    "word, nearest",
    [
        ("optim.learning_rate", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("train.warmup", "optim.warmup_share"),
        ("train.steps.x", "train.steps"),
        ("ffn.n_expert", "ffn.n_experts"),
    ],
)
def test_a_key_that_the_config_does_not_have_is_told_the_nearest(word, nearest):
    said = f"--config.{word} is no key of the config; the nearest is {nearest}."
    for words in ([f"--config.{word}=1"], [f"--config.{word}", "1"]):
        assert unknown_key(["--config=configs/smoke.py", *words]) == said
        assert unknown_key(["--config", "configs/smoke.py", *words]) == said
    with pytest.raises(InputError, match="is no key of the config"):
        config_of(["--config=configs/smoke.py", f"--config.{word}=1"])


def test_keys_that_the_config_has_are_not_unknown():
    words = ["--config.ffn.node_width[0]=1", "--noconfig.train.probe", "--config.train=3", "--config.seed=1"]
    assert unknown_key(["--config=configs/smoke.py", *words]) is None
    assert unknown_key(["--config=configs/nowhere.py", "--config.a=1"]) is None  # the file is what is wrong
    said = "--config.optim.routers_until is gone; the last commit that has it is 6211090."
    assert unknown_key(["--config=configs/smoke.py", "--config.optim.routers_until=0.5"]) == said


@pytest.mark.parametrize(
    "argument, words, key, of_kind",
    [
        ("leaf", {"depth": 3}, "depth: 3", "leaf"),
        ("leaf", {"width": 7}, "width: 7", "leaf"),
        ("tree", {"top_k": 3}, "top_k: 3", "tree"),
        ("random_tree", {"routing": "hard"}, "routing: 'hard'", "random_tree"),
        ("narrow", {"gate_norm": "l1"}, "gate_norm: 'l1'", "narrow"),
        ("dense", {"implementation": "gather"}, "implementation: 'gather'", "dense"),
        ("dense", {"width": 9, "n_experts": 3}, "n_experts: 3", "dense and width 9"),
    ],
)
def test_a_key_that_no_layer_reads_is_refused(argument, words, key, of_kind, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {f"ffn.{name}": value for name, value in words.items()}
    said = f"^ffn.{key} does nothing for layers of kind {of_kind}; leave it out.$"
    with pytest.raises(InputError, match=said):
        config_of(words_of("configs/default.py", {"kind": argument, **values}))
    with pytest.raises(InputError, match=said):
        make_config({"ffn.kind": argument, **values})


def test_a_key_that_some_layer_reads_is_not():
    layers = {"ffn.kind": "leaf", "model.n_layers": 2, "model.layers": "dense,tree"}
    assert make_config({**layers, "ffn.depth": 3, "ffn.top_k": 2, "ffn.routing": "hard"}).ffn.depth == 3
    assert make_config({"ffn.kind": "narrow", "ffn.top_k": 2, "ffn.expert_width": 3}).ffn.top_k == 2


def test_fine_tuning_has_the_layers_of_its_start(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="ffn.top_k: does nothing in fine-tuning"):
        config_of(["--config=configs/finetune.py:start=a", "--config.ffn.top_k=2"])
