"""What the tests of training have, these have too."""

from tests.training.conftest import compiled_once, texts

__all__ = ["compiled_once", "texts"]
