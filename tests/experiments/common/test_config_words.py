"""Words of a command line that set a config's keys: read as programs read them, or told the nearest key."""

import pathlib

import pytest

from experiments.common.config_words import config_of, unknown_key, words_of
from tree_ffn.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent.parent


def test_words_are_read_as_the_program_reads_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {"kind": "leaf", "ffn.node_width": (1, 2), "train.probe": True, "optim.lr": 3e-5, "ffn.top_k": 2}
    config = config_of(words_of("configs/smoke.py", values))
    assert (config.ffn.kind, config.ffn.node_width, config.train.probe) == ("leaf", (1, 2), True)
    assert (config.optim.lr, config.ffn.top_k) == (3e-5, 2)
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
