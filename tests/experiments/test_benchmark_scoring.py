"""Speed of scoring: what is compared, what is recorded, what is refused."""

import importlib.util

import pytest

from experiments.reporting.record import load_results
from tests.experiments import questions_data
from tests.experiments.make_harness_fixture import FIXTURE
from tests.experiments.programs import call

needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "lm_eval"))),
    reason="torch is not installed",
)


@needs_torch
def test_both_are_timed_and_agree(tmp_path):
    data = questions_data.write(tmp_path / "data")
    outcome = call(
        "benchmark_scoring", f"--task_data={data}", f"--task_cache={tmp_path}/cache",
        f"--tokenizer={FIXTURE}/opt/tokenizer.json", "--rows=2", "--width=16", "--layers=1", "--context=64",
        "--turns=1", "--hf_batches=2,4", f"--results={tmp_path}/r.jsonl",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = {row["metric"]: row for row in load_results(f"{tmp_path}/r.jsonl")}
    assert rows.keys() == {"rows_per_s", "rows_per_s_cold", "hf_rows_per_s", "ratio_to_hf"}
    value = lambda metric: rows[metric]["value"]
    assert value("ratio_to_hf") == pytest.approx(value("rows_per_s") / value("hf_rows_per_s"))
    config = rows["rows_per_s"]["config"]
    assert config["hf_batch_size"] in (2, 4) and len(config["data_sha256"]) == 64
    shown = call("tables", f"--results={tmp_path}/r.jsonl")
    assert shown.code == 0 and "| `opt_d16_L1_hellaswag` | 2 | 1 |" in shown.out, shown.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tokenizer=bytes"], "--task_data is missing"),
        (["--task_data=x"], "--tokenizer is missing"),
        (["--task_data=x", "--tokenizer=bytes", "--rows=0"], "--rows: 0 is not allowed"),
        (["--task_data=x", "--tokenizer=bytes", "--hf_batches=0"], "--hf_batches: '0' is not allowed"),
    ],
)
def test_wrong_input(arguments, said):
    outcome = call("benchmark_scoring", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
