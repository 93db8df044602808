"""One strict environment for every test: 8 fake CPU devices, no silent promotion, warnings are errors.

Warnings become errors, and slow tests are left out, by `[tool.pytest.ini_options]` in pyproject.toml.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; no accelerator unasked

import jax
import numpy as np
import pytest

FAKE_DEVICES = 8


def pytest_configure(config):
    del config
    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    _parse_absl_flags()


def _parse_absl_flags():
    """Code that reads absl flags meets the defaults, as if a program had been started without any."""
    try:
        from absl import flags
    except ImportError:  # the layer and the models work without absl
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of this very test: the seed is its name, so order and selection change nothing."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def room_for_compiled_code(request):
    """Thousands of compiled programs, as of the full product, exhaust a process's memory maps: XLA crashes.

    (Linux: vm.max_map_count, 65,530 by default; a worker of the tests met it after some 300 cases.)
    """
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@pytest.fixture
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return pathlib.Path(__file__).resolve().parent.parent
