"""experiments/oracle.py: what the best decisions would be worth, of a trained run."""

import pytest

from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.training.loop import train


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(texts, kind="tree", ffn__depth=2, ffn__routing="straight_through")
    train(config, str(workdir), log=lambda _: None, bar=False)
    return workdir


def test_a_line_a_layer_and_a_row_of_the_table(run, tmp_path):
    results = tmp_path / "rows.jsonl"
    done = call(
        "oracle", f"--workdir={run}", "--rows=2", "--rounds=3", f"--results={results}", "--row=tree_P2"
    )
    assert done.code == 0, done.err
    layers = [line.split() for line in done.out.splitlines() if line.strip().startswith("layer")]
    assert [cells[:2] for cells in layers] == [["layer", "0"], ["layer", "1"]]
    for _, _, own, first, last, _ in layers:
        assert float(own) >= float(first) >= float(last)

    rows = {row["metric"]: row["value"] for row in record.load_results([str(results)])}
    assert rows["oracle_loss"] <= rows["val_loss"] and 0 <= rows["moved"] <= 1
    mean = sum(float(cells[4]) for cells in layers) / 2
    assert rows["oracle_loss"] == pytest.approx(mean, abs=1e-4)
    assert "## Oracle routing, cpu" in render(str(results)) and "2 held-out rows, 3 rounds" in render(
        str(results)
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--workdir is missing"),
        (("--workdir={run}", "--rows=0"), "--rows: 0 is not allowed"),
        (("--workdir={run}", "--rows=100000"), "the held-out text has"),
        (("--workdir={run}", "--results=x.jsonl"), "--row"),
    ],
)
def test_bad_input(run, flags, said):
    done = call("oracle", *(flag.format(run=run) for flag in flags))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_other_layers_are_refused(texts, tmp_path):
    train(
        tiny_config(texts, kind="dense", ffn__width=14),
        str(tmp_path / "dense"),
        log=lambda _: None,
        bar=False,
    )
    done = call("oracle", f"--workdir={tmp_path}/dense", "--rows=2")
    assert done.code == 2 and "no layer of whole trees" in done.err
