"""`tree-ffn PROGRAM`: all programs by name, and one sentence where it cannot be run."""

import pathlib
import subprocess
import sys

import pytest

from experiments.__main__ import NAMES, first_line, listing

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(*words, without=None):
    code = f"import sys; sys.modules[{without!r}] = None; sys.argv = ['tree-ffn', *{words!r}]\n"
    code += "from experiments.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_program_is_listed_with_what_it_does():
    for name in NAMES:
        assert first_line(name).endswith(".") and f"  {name} " in listing()


@pytest.mark.parametrize(
    "words, without, said",
    [
        (["trian"], None, "tree-ffn: 'trian' is no program (did you mean train?); use one of: train, "),
        (
            ["train", "--help"], "ml_collections",
            "tree-ffn: train needs the package ml_collections; pip install 'tree_ffn[train]' brings it.\n",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run_says_so(words, without, said):
    done = run(*words, without=without)
    assert done.returncode == 2 and done.stderr.startswith(said) and not done.stdout


def test_a_program_gets_its_flags():
    done = run("tables", "--results=nowhere.jsonl", "--check", "--latex")
    assert done.returncode == 2 and "--latex and --mixed are not allowed" in done.stderr
