"""The program that prepares data, run as a user runs it, and TFDS data sets by name."""

import json
import os
import subprocess
import sys

import pytest

from tree_ffn.data import CorpusSpec, prepare
from tree_ffn.errors import InputError


def run(repository, *flags):
    command = [sys.executable, "-m", "experiments.prepare_data", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_prepares_what_training_then_finds(tmp_path, repository):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("".join(f"line {i}\n<|endoftext|>\n" for i in range(300)))
    data = {
        "corpus": "files",
        "files": f"{tmp_path}/texts/*",
        "cache_dir": f"{tmp_path}/cache",
    }
    done = run(
        repository,
        "--config=configs/smoke.py",
        *(f"--config.data.{key}={value}" for key, value in data.items()),
    )
    assert done.returncode == 0, done.stderr
    lines = []
    corpus = prepare(CorpusSpec(**data), 33, lines.append)
    assert not lines and f"ready in {corpus.directory}" in done.stdout
    assert json.dumps(corpus.meta, indent=2) in done.stdout


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "--config is missing; name a file, e.g. --config=configs/quickstart.py."),
        (
            ["--config=configs/smoke.py", "--config.data.corpus=web"],
            "data.corpus: 'web' is not known; use one of: python_",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(repository, flags, sentence):
    done = run(repository, *flags)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.strip().count("\n") == 0


def test_a_data_set_by_name_is_prepared_once(tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    from experiments.prepare_data import prepare_named
    from tests.data.test_tfds_input import SmallSet

    spec = CorpusSpec(
        corpus="tfds",
        tfds_dir=str(tmp_path / "tfds"),
        tfds_name="small_set",
        cache_dir=str(tmp_path / "cache"),
        valid_share=0.3,
    )
    assert SmallSet.name == "small_set"
    with pytest.raises(InputError, match="is not prepared"):
        prepare(spec, 9, print)
    prepare_named(spec)
    prepare_named(spec)
    assert capsys.readouterr().out.count("preparing TFDS data set small_set") == 1
    assert prepare(spec, 9, print).meta["documents"] == 50


def test_a_data_set_that_cannot_be_prepared(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    from experiments.prepare_data import prepare_named
    from tests.data.test_tfds_input import SmallSet

    def offline(*_, **__):
        raise ConnectionError("no route to host.\nat all")

    monkeypatch.setattr(SmallSet, "download_and_prepare", offline)
    spec = CorpusSpec(corpus="tfds", tfds_dir=str(tmp_path), tfds_name="small_set")
    with pytest.raises(
        InputError, match=r"^data\.tfds_name: 'small_set' cannot be prepared here \(no route to host\);"
    ):
        prepare_named(spec)
