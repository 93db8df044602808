"""Kernels that are built unasked: once, where there is a compiler, and never in vain again."""

import subprocess
import sys

import pytest

from tree_ffn.tree import kernels
from tree_ffn.tree.kernels import compilers, first_use


@pytest.fixture
def asked(not_built, monkeypatch):
    """Builds as a program does, and gives what it says."""
    monkeypatch.delenv(first_use.VARIABLE)

    def build(*platforms):
        said = []
        first_use.build(*platforms, say=said.append)
        return said

    return build


def test_what_was_built_is_used(library, asked, monkeypatch):
    """The library of these tests was built so. It is looked for first: nobody waits for who builds others."""
    monkeypatch.setenv("TREE_FFN_KERNELS", str(library))
    monkeypatch.setattr(first_use, "locked", None)
    assert kernels.shared_object().exists() and asked("cpu") == []


def test_without_a_compiler_it_is_said_once(asked, monkeypatch):
    monkeypatch.setenv("PATH", "")
    first, why = asked("cpu")
    assert first == "compiling kernels for this cpu, once ..."
    assert "no C++ compiler was found" in why and "without these kernels all works" in why
    assert asked("cpu") == []
    assert not kernels.shared_object().exists()


def test_nothing_is_built_for_others_or_where_it_is_forbidden(asked, not_built, monkeypatch):
    assert asked("gpu") == asked() == []
    monkeypatch.setenv(first_use.VARIABLE, "0")
    assert asked("cpu") == [] and not list(not_built.iterdir())


def test_a_directory_that_cannot_be_written_is_no_error(asked, not_built, monkeypatch):
    monkeypatch.setenv("TREE_FFN_KERNELS", str(not_built / "none"))
    assert asked("cpu") == []


@pytest.mark.slow
@pytest.mark.skipif(not compilers.found(), reason="needs a C++ compiler")
def test_two_processes_build_once(asked, not_built):
    program = "from tree_ffn.tree.kernels import first_use; first_use.build('cpu')"
    start = lambda: subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    said = [process.communicate()[1] for process in (start(), start())]
    assert sum("compiling kernels" in one for one in said) == 1 and kernels.shared_object().exists()
