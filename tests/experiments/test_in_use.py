"""A directory that another process writes in is refused by every program that would write there too."""

import threading

import pytest

from tests.elsewhere import held_elsewhere
from tests.experiments.programs import call
from tree_ffn.data import CorpusSpec, prepare
from tree_ffn.locks import NAME

WRITERS = [
    ("train", "--workdir={}", "--config=configs/smoke.py"),
    ("finetune", "--workdir={}", "--config=configs/finetune.py"),
    ("quickstart", "--workdir={}", "--config=smoke"),
    ("ablate", "--workdir={}", "--sweep=configs/sweeps/t4_cpu.py", "--results={}/r.jsonl"),
    ("convert", "--to={}", "--workdir=none", "--method=cluster"),
    ("prune", "--to={}", "--workdir=none", "--threshold=0"),
    ("import_model", "--to={}", "--from=none"),
    ("export", "--to={}", "--workdir=none"),
]


@pytest.mark.parametrize("program, place, flags", [(w[0], w[1], w[2:]) for w in WRITERS])
def test_the_second_writer_is_refused(repository, tmp_path, monkeypatch, program, place, flags):
    monkeypatch.chdir(repository)
    directory = tmp_path / "run"
    words = [word.format(directory) for word in (place, *flags)]
    with held_elsewhere(directory / NAME):
        outcome = call(program, *words)
        assert [path.name for path in directory.iterdir()] == [NAME]
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    said = f"{directory} is in use by process 7 on host node3 since 2026-01-01; wait until it has ended, stop"
    assert said in outcome.err


def test_two_that_prepare_one_text_wait_for_each_other(texts, tmp_path):
    """The second finds the rows that the first made."""
    spec = CorpusSpec(corpus="files", files=f"{texts}/*.txt", cache_dir=str(tmp_path))
    said, made = [], []
    first = prepare(spec, 33, said.append)
    lock = tmp_path / f"{first.directory.name}.lock"
    (first.directory / "meta.json").rename(tmp_path / "meta.json")  # as before it was prepared
    with held_elsewhere(lock):
        second = threading.Thread(target=lambda: made.append(prepare(spec, 33, said.append)))
        second.start()
        second.join(0.5)
        assert not made
        (tmp_path / "meta.json").rename(first.directory / "meta.json")
    second.join(60)
    assert made[0].meta == first.meta and not lock.exists()
    assert sum(line.startswith("prepared") for line in said) == 1
