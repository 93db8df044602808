"""A checkpoint is read beside a run that removes it."""

import os
import shutil
import tempfile

import jax
import numpy as np
import pytest

from tests.elsewhere import held_elsewhere
from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.locks import NAME
from tree_ffn.training import restore
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """The workdir of a run with checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny_config(texts, train__keep=2), str(workdir), log=lambda _: None, bar=False)
    return workdir


@pytest.fixture
def beside(finished, tmp_path, monkeypatch):
    """A copy of it that another process writes in."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    shutil.copytree(finished, tmp_path / "run")
    with held_elsewhere(tmp_path / "run" / NAME):
        yield tmp_path / "run"
    assert os.listdir(tmp_path / "tmp") == []


def removes(monkeypatch):
    """The other process removes step 6 when it is about to be read."""
    copied = restore.copied_whole

    def removed_meanwhile(step, to):
        if step.endswith("6"):
            shutil.rmtree(step)
        return copied(step, to)

    monkeypatch.setattr(restore, "copied_whole", removed_meanwhile)


def test_it_is_the_same_model(beside, finished):
    ours, theirs = (restore_for_inference(str(workdir), "latest") for workdir in (beside, finished))
    assert ours.meta == theirs.meta and ours.meta["step"] == 6
    for one, other in zip(*(jax.tree.leaves(run.variables) for run in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_latest_is_looked_up_anew(beside, monkeypatch):
    removes(monkeypatch)
    assert restore_for_inference(str(beside), "latest").meta["step"] == 3


def test_a_step_that_is_named_is_missed(beside, monkeypatch):
    removes(monkeypatch)
    with pytest.raises(InputError, match=r"step: 6 has no checkpoint; use best, latest or one of \[3\]"):
        restore_for_inference(str(beside), 6)


def test_files_that_go_while_they_are_copied_are_noticed(beside, monkeypatch):
    link, gone = os.link, []

    def slow(path, to):
        link(path, to)
        if not gone and "/6/" in path:
            gone.append(path)
            os.remove(path)

    monkeypatch.setattr(os, "link", slow)
    monkeypatch.setattr(restore, "TRIES", 1)
    with pytest.raises(
        InputError, match="step: 'latest' of .*run is removed before it is read; .*train.keep"
    ):
        restore_for_inference(str(beside), "latest")
    assert gone


def test_another_file_system_gets_copies(beside, monkeypatch):
    def link(path, to):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert restore_for_inference(str(beside), "latest").meta["step"] == 6


def test_no_room_for_a_copy_is_said(beside, monkeypatch):
    def full(path, to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(InputError, match="TMPDIR: .* has no room for the model"):
        restore_for_inference(str(beside))
