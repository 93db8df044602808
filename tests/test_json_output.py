"""Files and answers are JSON, which knows no NaN."""

import json
import math

import pytest

from tree_ffn.errors import NotFinite
from tree_ffn.json_output import json_text, number_or_none
from tree_ffn.training.logger import MetricsWriter


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_number_is_named(bad):
    with pytest.raises(NotFinite, match=f"^x.json: rows.1.loss is {bad}, which is no number of JSON"):
        json_text({"rows": [{"loss": 1.0}, {"loss": bad}]}, "x.json", indent=2)


def test_numbers_are_as_they_were():
    value = {"a": [1.5, None, 1e308, "NaN"], "b": (2, True)}
    assert json_text(value, "x") == json.dumps(value)
    assert [number_or_none(one) for one in (1.5, None, math.nan)] == [1.5, None, None]
    with pytest.raises(TypeError):
        json_text({"a": object()}, "x")


def test_a_figure_of_nothing_is_left_out_of_the_metrics(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    writer.write(3, "valid", {"loss": 2.5, "changed/0": math.nan})
    with pytest.raises(NotFinite, match="loss is inf"):
        writer.write(4, "valid", {"loss": math.inf})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "split": "valid", "loss": 2.5}
