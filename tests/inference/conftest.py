"""What holds for tests of models holds here too."""

from tests.models.conftest import quick_compilation

__all__ = ["quick_compilation"]
