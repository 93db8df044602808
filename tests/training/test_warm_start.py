"""A run that begins with a changed model: what its checkpoint says, and what training makes of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.training.workdir import begin_run, read_json

QUIET = {"log": lambda _: None, "bar": False}


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """A run of dense layers."""
    workdir = tmp_path_factory.mktemp("source")
    train(tiny_config(texts, kind="dense", ffn__width=14), str(workdir), **QUIET)
    return restore_for_inference(str(workdir))


@pytest.fixture
def begun(source, tmp_path):
    """A run with half of the units, in a directory of its own."""
    half = source.model.ffns[0].width // 2
    model = dataclasses.replace(source.model, ffns=(DenseSpec(half),) * len(source.model.ffns))
    ffn = {
        name: a if name == "b_out" else a[:, :half]
        for name, a in source.variables["params"]["run_0"]["ffn"].items()
    }
    params = {**source.variables["params"], "run_0": {**source.variables["params"]["run_0"], "ffn": ffn}}
    begin_run(str(tmp_path / "new"), source, model, {"params": params}, val_loss=4.5, pruned={"half": True})
    return tmp_path / "new", model, params


def test_what_is_written(source, begun):
    workdir, model, params = begun
    found = restore_for_inference(str(workdir), 0)
    assert found.model == model and found.meta["pruned"] == {"half": True} and found.meta["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], params)
    assert read_json(str(workdir), "config.json") == source.meta["config"]
    assert read_json(str(workdir), "data.json") == json.loads(json.dumps(source.meta["data"]))
    with Checkpoints(str(workdir)) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (0, 0)


@pytest.mark.slow
def test_it_goes_on_and_resumes_with_its_model(texts, begun):
    workdir, model, params = begun
    config = tiny_config(
        texts, kind="dense", ffn__width=14, steps=4, optim__lr=1e-3, train__checkpoint_every=2
    )
    assert train(config, str(workdir), **QUIET)["step"] == 4
    found = restore_for_inference(str(workdir), "latest")
    assert found.model.ffns == model.ffns and found.meta["step"] == 4
    again = train(config, str(workdir), **QUIET)  # nothing is left to do, by the same model
    assert again["step"] == 4
    with pytest.raises(InputError, match="holds a run of another config"):
        train(tiny_config(texts, kind="dense", ffn__width=14, steps=4, optim__lr=0.5), str(workdir), **QUIET)


def test_the_config_still_says_how_it_is_computed(texts, begun):
    workdir, *_ = begun
    config = tiny_config(texts, kind="dense", ffn__width=14, model__remat="full")
    assert train(config, str(workdir), **QUIET)["step"] == 6
    assert restore_for_inference(str(workdir), "latest").model.remat == "none"  # of the checkpoint's own spec
