"""What holds for all tests by default holds here in `make test-full` too: XLA does not optimise.

These tests are mostly compilation, which then takes less than half of the time.
"""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
