"""The words of --texts."""

import pytest
from absl import flags

from experiments.reporting import texts
from tree_ffn.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in ("a, b.txt", "c,d.txt", "[e].txt", "f.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "table.csv").write_text("text")
    monkeypatch.chdir(tmp_path)


def parse(value):
    return texts.parse(flags.ListParser().parse(value))


def test_paths_are_themselves():
    assert parse("one=a, b.txt,two=c,d.txt") == {"one": "a, b.txt", "two": "c,d.txt"}
    assert parse("three=[e].txt, four=?.txt") == {"three": "[e].txt", "four": "?.txt"}


@pytest.mark.parametrize(
    "value, words",
    [
        ("a=f.txt,b", "'b' is not allowed; use name=glob pattern"), ("a=f.txt,a=f.txt", "each name once"),
        ("a=none.txt", "'none.txt' matches no file"), ("a=table.csv", r"\.csv is a table"),
    ],
)  # fmt: skip
def test_mistakes(value, words):
    with pytest.raises(InputError, match=f"^--texts: .*{words}"):
        parse(value)
