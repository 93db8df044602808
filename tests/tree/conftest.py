"""The C++ part, built and not built."""

import jax
import pytest

from tree_ffn.tree import kernels
from tree_ffn.tree.kernels import compilers, first_use
from tree_ffn.tree.leaf import beam

# JAX tells programs of one value of this from those of another: none is found that was compiled elsewhere.
compiled_for = jax.make_user_context("")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The directory that the library was built into."""
    if not compilers.found():
        pytest.skip("needs a C++ compiler (Debian package g++)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREE_FFN_KERNELS", str(tmp_path_factory.mktemp("kernels")))
        patch.delenv(first_use.VARIABLE)
        first_use.build("cpu")  # a failure is said, and `built` finds nothing
        return kernels.shared_object().parent


@pytest.fixture
def built(library, monkeypatch):
    """Programs that are compiled now read rows where they lie; those before and after do not.

    Beams read those that they ask for any number of tokens.
    """
    monkeypatch.setattr(beam, "few", lambda n_tokens, width, spec: True)
    yield from looked_for_in(library, monkeypatch)


@pytest.fixture
def not_built(tmp_path, monkeypatch):
    """The directory where it is looked for, an empty one."""
    yield from looked_for_in(tmp_path, monkeypatch)


def looked_for_in(directory, monkeypatch):
    monkeypatch.setenv("TREE_FFN_KERNELS", str(directory))
    kernels.is_loaded.cache_clear()
    with compiled_for(str(directory)):
        yield directory
    monkeypatch.undo()
    kernels.is_loaded.cache_clear()
