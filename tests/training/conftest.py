"""Programs that several tests compile are compiled once: a cache on disk for this session.

Processes that tests start find it too, by the environment variable.
"""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.training.tiny import write_texts


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    directory = str(shared / "compiled")
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_disable_most_optimizations": True,  # compiling takes longer than these models take to run
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A directory of text files."""
    return write_texts(tmp_path_factory.mktemp("texts"))
