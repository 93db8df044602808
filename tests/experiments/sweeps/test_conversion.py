"""`make convert-demo` at the smallest size: a dense run, its conversion, and a sweep of fine-tunings."""

import re
import shlex
import subprocess

import pytest

from experiments.reporting import record
from experiments.tables import render
from tests.experiments.programs import call


@pytest.fixture
def commands(repository, texts, tmp_path, monkeypatch):
    """A function that gives the words of what the target still has to run, by program."""
    monkeypatch.chdir(repository)
    data = f"--config.data.files={texts}/*.txt --config.data.cache_dir={texts}/cache --config.mesh.data=1"
    dense = f"--config=configs/smoke.py:kind=dense {data}"
    few = "--tokens=512 --held_out=256 --batch_size=8 --batches=2 --refits=1"
    rows = "--rows=^(cluster_leaf_distilled|dense_tuned)$$"
    common = "--set=mesh.data=1 --set=train.batch_size=8 --set=train.eval_batches=2"
    values = {
        "DEMO": f"{tmp_path}/demo", "DEMO_STEPS": 2, "DEMO_CONFIG": dense,
        "DEMO_LEAVES": f"--n_experts=8 --top_k=3 {few}", "DEMO_TREES": f"--n_trees=2 --depth=3 {few}",
        "DEMO_SWEEP": f"--notune '{rows}' {common} --texts=license=LICENSE",
    }  # fmt: skip

    def left():
        words = ["make", "-n", "convert-demo", *(f"{name}={value}" for name, value in values.items())]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
        found = {}
        for line in said.splitlines():
            if program := re.search(r"-m experiments\.(\w+) (.*)", line):
                found.setdefault(program[1], []).append(shlex.split(program[2]))
        return found

    return left


@pytest.mark.slow
def test_a_dense_model_is_trained_converted_and_trained_further(commands, tmp_path):
    """The files that stand for what is done are looked at by make, the rows of results by ablate."""
    demo, results = tmp_path / "demo", f"{tmp_path}/demo/conversion.jsonl"
    todo = commands()
    assert {name: len(found) for name, found in todo.items()} == {
        "train": 1, "convert": 4, "ablate": 1, "tables": 1
    }  # fmt: skip
    (sweep,) = todo["ablate"]
    refused = call("ablate", *sweep)
    assert refused.code == 2 and refused.err.count("\n") == 1 and "cluster_leaf" in refused.err, refused.err

    assert call("train", *todo["train"][0]).code == 0
    (demo / "seed0/dense/done").touch()
    outcome = call("convert", *todo["convert"][0])
    assert outcome.code == 0 and (demo / "seed0/cluster_leaf/config.json").exists(), outcome.err
    assert commands().keys() == {"convert", "ablate", "tables"} and len(commands()["convert"]) == 3

    assert "2 runs, 2 to do" in call("ablate", *sweep, "--dry").out
    printed = call("ablate", *sweep, "--print").out.splitlines()
    assert len(printed) == 2 and all("-m experiments.finetune --config=" in line for line in printed)
    assert f"--config.finetune.start={demo}/seed0/cluster_leaf" in printed[0]

    # One as a process would make it, the other by the sweep.
    outcome = call("finetune", *shlex.split(printed[0])[3:])
    assert outcome.code == 0, outcome.err
    outcome = call("ablate", *sweep)
    assert outcome.code == 0 and "2 runs, 1 of them are done" in outcome.out, outcome.err
    again = call("ablate", *sweep)
    assert "2 runs, 2 of them are done" in again.out and "step" not in again.out

    rows = record.load_results(results)
    found = {(row["row"], row["metric"]) for row in rows if row["table"] == "conversion"}
    for name in ("cluster_leaf_distilled", "dense_tuned"):
        metrics = ("val_loss", "loss_before", "loss_teacher", "license_nats_per_word")
        assert {(name, metric) for metric in metrics} <= found
    commands_of = {row["row"]: row["command"] for row in rows}
    assert commands_of["dense_tuned"].startswith(
        "python -m experiments.finetune --config=configs/finetune.py"
    )
    page = render(results)
    assert "## Conversion" in page and "## Fine-tuning of converted models, 2 steps" in page
    assert page.count("x dense, after") == 1, "both fine-tunings stand in one table"

    # Other texts of a conversion stand in its line.
    name = next(row["row"] for row in rows if row["metric"] == "kept")
    outcome = call(
        "evaluate", f"--workdir={demo}/seed0/cluster_leaf", "--texts=license=LICENSE", "--table=conversion",
        f"--row={name}", f"--results={results}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    line = next(line for line in render(results).splitlines() if line.startswith(f"| `{name}`"))
    assert "|  |" not in line, "kept and nats a word"
