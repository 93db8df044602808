"""Paths as people write them: found at home, or refused by name."""

import os
import pwd

import pytest

from tests.training.tiny import tiny_config
from tree_ffn.data import CorpusSpec, load_tokenizer
from tree_ffn.data.text_files import matches
from tree_ffn.errors import InputError
from tree_ffn.paths import local, local_each
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference

ELSEWHERE = ["gs://b/x", "s3://b/*.txt", "hdfs:///x", "memory://x", "https://h/x.txt", "GS://b", "gs:/b/x",
             "az://c/x", "file://other.host/x", "hf://datasets/x", "abfss://c@a.net/x"]  # fmt: skip


def test_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    user = pwd.getpwuid(os.getuid())
    for path, found in {
        "": "", "runs/a": "runs/a", "/a/~/b": "/a/~/b", "./~": "./~", "a:b/c": "a:b/c",
        "x.py:a=b/c": "x.py:a=b/c", "~": str(tmp_path), "~/runs/*.txt": f"{tmp_path}/runs/*.txt",
        f"~{user.pw_name}/a": f"{user.pw_dir}/a",
        "file:///a/b": "/a/b", "file://localhost/a": "/a", "file:/a": "/a", "$HOME/a": "$HOME/a",
    }.items():  # fmt: skip
        assert local(path, "workdir") == found
        assert local(found, "workdir") == found
    assert local_each("~/a, file:///b,c", "x") == f"{tmp_path}/a,/b,c"


@pytest.mark.parametrize("path", ELSEWHERE)
def test_what_is_elsewhere_is_refused_by_name(path):
    with pytest.raises(InputError) as refused:
        local(path, "workdir")
    assert str(refused.value).startswith(f"workdir: {path!r} is not on this machine; ")
    with pytest.raises(InputError, match="^workdir: .* is not on this machine"):
        local_each(f"a,{path}", "workdir")


def test_an_unknown_user():
    with pytest.raises(InputError, match="^workdir: '~no_such_user/a' names no user of this machine"):
        local("~no_such_user/a", "workdir")


def test_every_place_of_the_library(tmp_path, monkeypatch):
    """Each field, expanded and refused, without a program around it; nothing is made."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "a.txt").write_text("text")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert matches("data.files", "~/*.txt") == [home / "a.txt"]
    spec = CorpusSpec(files="~/a.txt,b", valid_files="file:///c", cache_dir="~/cache")
    assert (spec.files, spec.valid_files, spec.cache_dir) == (f"{home}/a.txt,b", "/c", f"{home}/cache")
    assert CorpusSpec(tfds_dir="~/set").tfds_dir == f"{home}/set"
    for name, values in {
        "data.files": {"files": "gs://b/*"},
        "data.valid_files": {"files": "a", "valid_files": "s3://b/*"},
        "data.tfds_dir": {"tfds_dir": "gs://tfds"},
        "data.cache_dir": {"cache_dir": "memory://x"},
    }.items():
        with pytest.raises(InputError, match=f"^{name}: .* is not on this machine"):
            CorpusSpec(**values)
    with pytest.raises(InputError, match=r"^data.tokenizer: 'gs://b/tokenizer.json' is not on this machine"):
        load_tokenizer("gs://b/tokenizer.json")
    with pytest.raises(InputError, match="^data.tokenizer: .*home/tokenizer.json' is not a file"):
        load_tokenizer("~/tokenizer.json")
    for use in (lambda: train(tiny_config(here), "s3://b/run"), lambda: restore_for_inference("s3://b/run")):
        with pytest.raises(InputError, match="^workdir: 's3://b/run' is not on this machine"):
            use()
    assert not list(here.iterdir()) and [path.name for path in home.iterdir()] == ["a.txt"]
