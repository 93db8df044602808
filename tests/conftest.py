"""One strict environment for every test: 8 fake CPU devices, no silent promotion, warnings are errors.

Warnings become errors, and slow tests are left out, by `[tool.pytest.ini_options]` in pyproject.toml.
"""

import functools
import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; no accelerator unasked
# Tests are mostly compilation, so XLA is told not to optimise (below), and XLA of jax 0.10 to write its loops
# in an older way, which compiles more than twice as fast, and each program in one part, since processes have
# a core each: a fifth less time. XLA_FLAGS= (make test-full) runs what users run.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", fast)
os.environ.setdefault("TREE_FFN_BUILD", "0")  # programs leave kernels to the tests of kernels
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # operations need not know their callers

import jax
import numpy as np
import pytest

FAKE_DEVICES = 8
AS_USERS = os.environ.get("XLA_FLAGS") == ""


def pytest_configure(config):
    del config
    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
    jax.config.update("jax_disable_most_optimizations", not AS_USERS)
    gc.set_threshold(50_000, 20, 50)  # compiled programs are many and stay; looking through them takes time
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    _parse_absl_flags()


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay to the end: no collection need look through them


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


@pytest.fixture(scope="module", autouse=True)
def room_for_the_next_module():
    """The same of a whole suite in one process: a third of the maps at most are left to those that follow."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def jit_as_users():
    """jax.jit for what is said of bits and last digits: compiled as users' programs are, whatever tests do.

    Neither with older loops nor unoptimised, as above: there a product and a sum round twice, and tanh(-6)
    is not -1.
    """
    older = "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    name, options = "jax_disable_most_optimizations", {"xla_cpu_use_fusion_emitters": True} if older else None
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield functools.partial(jax.jit, compiler_options=options)
    jax.config.update(name, before)


@pytest.fixture
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return pathlib.Path(__file__).resolve().parent.parent
