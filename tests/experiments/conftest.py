"""What the tests of training have, the tests of its programs have too; and small imported models."""

import pytest

from experiments.common import loaded
from tests.experiments.make_harness_fixture import CASES, FIXTURE
from tests.experiments.programs import call
from tests.training.conftest import compiled_once, texts

__all__ = ["compiled_once", "texts"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (directory, model)}: the fixture's checkpoints, imported."""
    found = {}
    for family in CASES:
        directory = tmp_path_factory.mktemp("models") / family
        outcome = call("import_model", f"--from={FIXTURE / family}", f"--to={directory}")
        assert outcome.code == 0, outcome.err
        found[family] = directory, loaded.load(None, str(directory))
    return found


@pytest.fixture(scope="module")
def exported(models):
    """The OPT's directory."""
    return models["opt"][0]
