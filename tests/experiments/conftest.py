"""What the tests of training have, the tests of its programs have too."""

from tests.training.conftest import compiled_once, texts

__all__ = ["compiled_once", "texts"]
