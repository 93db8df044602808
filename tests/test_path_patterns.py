"""Paths that are there are themselves, whatever signs are in their names."""

import pytest

from tree_ffn.data.text_files import matches
from tree_ffn.errors import InputError
from tree_ffn.paths import expanded, split_at_commas

NAMES = (
    "[2024] set/texts.txt", "run [1].txt", "a, b.txt", "a,b,c.txt", "why?.txt", "x, y/one.txt",
    "x, y/two.txt", "x, y/p,q/three, 3.txt", "b.txt", "*.txt",
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_itself(place, name):
    assert matches("--files", name) == matches("--files", str(place / name)) == [place / name]


def test_lists(place):
    everything = [place / name for name in ("a, b.txt", "run [1].txt", "a,b,c.txt", "b.txt")]
    assert matches("--files", "a, b.txt,run [1].txt, a,b,c.txt,b.txt") == everything
    assert matches("--files", ",b.txt, ,") == [place / "b.txt"]
    assert matches("--files", "x, y/*.txt,b.*") == [
        place / "x, y/one.txt",
        place / "x, y/two.txt",
        place / "b.txt",
    ]
    assert matches("--files", "[2024] set/*") == [place / "[2024] set/texts.txt"]
    with pytest.raises(InputError, match=r"^--files: 'a' matches no file"):
        matches("--files", "a, none.txt")


def test_patterns_still_mean_patterns(place):
    assert expanded("[bc].txt") == ["b.txt"] and expanded("**/t*.txt") == [
        "[2024] set/texts.txt",
        "x, y/p,q/three, 3.txt",
        "x, y/two.txt",
    ]
    assert expanded("*.txt") == ["*.txt"]  # a file of that name is there
    assert len(expanded("./?*.txt")) == 6 and expanded("") == expanded("none/*") == []


def test_long_lists_are_split_at_once(place):
    for folder in (f"{place}/", "x, y/", ""):
        names = [f"{folder}{i}.txt" for i in range(2000)]
        assert split_at_commas(",".join(names)) == names
