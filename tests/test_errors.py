"""Checks of single values."""

import json
import math

import numpy as np
import pytest

from tree_ffn.errors import InputError, NotFinite, check_number, check_positive_int
from tree_ffn.json_output import json_text
from tree_ffn.models import ModelSpec, spec_from_dict, spec_to_dict
from tree_ffn.tree import TreeShape, TreeSpec

KINDS = [int, np.int64, np.int8, np.uint32]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_numpy_are_numbers(kind):
    check_positive_int("field", kind(3))
    check_number("field", kind(3), least=3)
    with pytest.raises(
        InputError, match=r"^field: .*0.* is not allowed; use a whole number of at least 1\.$"
    ):
        check_positive_int("field", kind(0))


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_numbers_of_numpy_are_numbers(kind):
    check_number("field", kind(0.5), above=0)
    for value in (kind("nan"), kind("inf"), kind(-0.5)):
        with pytest.raises(InputError, match=r"^field: .* is not allowed; use a number of at least 0\.$"):
            check_number("field", value, least=0)
    with pytest.raises(InputError):
        check_positive_int("field", kind(2.0))


@pytest.mark.parametrize("value", [True, np.True_, "3", None, np.ones(1), 1j])
def test_what_is_no_number_is_refused(value):
    for check in (check_number, check_positive_int):
        with pytest.raises(InputError, match="is not allowed; use a"):
            check("field", value)


def test_a_model_sized_by_numpy_is_the_same_and_is_written_the_same():
    plain = ModelSpec(9, 8, 4, 1, 1, (TreeSpec(TreeShape(2, 3, 1), balance_rate=0.5),))
    layer = TreeSpec(TreeShape(np.int64(2), np.int32(3), np.uint8(1)), balance_rate=np.float32(0.5))
    same = ModelSpec(np.int64(9), np.int64(8), np.int64(4), 1, 1, (layer,))  # type: ignore[arg-type]
    assert same == plain and hash(same) == hash(plain)
    text = json_text(spec_to_dict(same), "model")
    assert json.loads(text) == json.loads(json_text(spec_to_dict(plain), "model"))
    assert spec_from_dict(json.loads(text)) == plain
    with pytest.raises(NotFinite, match=r"x: a.0 is nan, which is no number of JSON"):
        json_text({"a": [np.float32(math.nan)]}, "x")


def test_a_rate_in_words_is_refused():
    with pytest.raises(InputError, match="balance_rate: '0.5' is not allowed; use a number"):
        TreeSpec(TreeShape(2, 3), balance_rate="0.5")  # type: ignore[arg-type]
