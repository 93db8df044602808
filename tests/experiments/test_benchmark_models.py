"""Times of whole steps: what is compared, what is counted, what is refused."""

import copy
import pathlib

import jax
import numpy as np
import pytest

from experiments.benchmarks.decode_times import Decoding
from experiments.benchmarks.step_times import Steps, load_config
from experiments.benchmarks.timing import take_turns
from experiments.planning.compiled_step import compile_step
from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tree_ffn.errors import InputError
from tree_ffn.training.sharding import make_mesh

ROOT = pathlib.Path(__file__).parent.parent.parent
SWEEP = """
def get_sweep():
    row = {"set": {"kind": "tree", "ffn.node_width": (2,)}}
    return {"config": "configs/smoke.py", "table": "t4_small", "set": {"seed": 3}, "rows": {"wide": row}}
"""


@pytest.fixture(scope="module")
def steps():
    config = load_config("configs/smoke.py:kind=tree")
    with jax.set_mesh(make_mesh(1, 1)):
        found = Steps(config, 257, make_mesh(1, 1))
        found.compile()
        assert int(found._state.step) == 2  # each of its two programs is a whole training step
        yield found


def test_a_step_is_timed_after_the_dense_start_or_in_it():
    config = load_config("configs/smoke.py:kind=leaf")
    starts = [
        Steps(config, 257, make_mesh(1, 1), in_start).model.ffns[0].dense_start for in_start in (False, True)
    ]
    assert starts == [0.0, 0.2]


def test_only_one_of_the_two_programs_counts(steps):
    visits = lambda: int(np.asarray(steps._usage[0]).sum())
    before, taken = visits(), int(steps._state.step)
    steps.run(False)
    assert visits() == before
    steps.run(True)
    assert visits() == before + 2 * 2 * 8 * 32  # layers, trees, rows, tokens
    assert int(steps._state.step) == taken + 2


def test_a_step_needs_what_its_plan_says(steps, capsys):
    config = load_config("configs/smoke.py:kind=tree")
    config.mesh.data = 1
    plan = compile_step(config, jax.devices()[:1])
    found = steps.say_memory()
    assert found == {"planned_gb": pytest.approx(plan["argument_gb"] + plan["temporary_gb"], rel=0.01)}
    assert f"{found['planned_gb']:.3f} GB a device by the compiler; these devices" in capsys.readouterr().out


def test_figures_are_of_medians_in_turns(steps):
    steps._times = {True: [], False: []}
    take_turns([steps], seconds=0.0)
    assert [len(times) for times in steps._times.values()] == [3, 3]
    steps._times = {True: [0.2, 0.1, 0.4], False: [0.19, 0.08, 0.4]}
    assert steps.figures(steps) == pytest.approx(
        {"time_ms": 200.0, "tokens_per_s": 8 * 32 / 0.2, "ratio_to_first": 1.0, "counting": 0.05}
    )
    slower = copy.copy(steps)
    slower._times = {True: [0.3], False: [0.3]}
    assert steps.figures(slower)["ratio_to_first"] == pytest.approx(1.5)  # how many times as fast


def test_a_token_of_every_text_is_timed():
    config = load_config("configs/smoke.py:kind=leaf")
    timed = Decoding(config, 257, batch=2, context=5, n_tokens=3)
    timed.compile()
    take_turns([timed], seconds=0.0)
    assert timed._cache.length.tolist() == [8, 8] and len(timed._times) == 3
    timed._times = [0.1, 0.2, 9.0]
    assert timed.figures(timed) == {"time_ms": 200.0, "tokens_per_s": 10.0, "ratio_to_first": 1.0}
    slower = copy.copy(timed)
    slower._times = [0.3]
    assert timed.figures(slower)["ratio_to_first"] == pytest.approx(1.5)
    with pytest.raises(InputError, match="do not fit the model's context of 32"):
        Decoding(config, 257, batch=1, context=28, n_tokens=5)


@pytest.mark.slow
def test_decoding_as_a_program(tmp_path):
    results = tmp_path / "rows.jsonl"
    runs = [f"--run=configs/smoke.py:kind={kind}" for kind in ("dense", "leaf")]
    outcome = call(
        "benchmark_models", "decode", *runs, "--seconds=0", "--context=8", "--new=2", f"--results={results}"
    )
    assert outcome.code == 0, outcome.err
    rows = {(row["row"], row["metric"]): row["value"] for row in load_results(str(results))}
    assert rows["smoke_kinddense", "ratio_to_first"] == 1.0 and rows["smoke_kindleaf", "tokens_per_s"] > 0


@pytest.mark.slow
def test_the_program(tmp_path):
    results = tmp_path / "rows.jsonl"
    sweep = tmp_path / "sweep.py"
    sweep.write_text(SWEEP)
    runs = [f"--run=configs/smoke.py:kind={kind}" for kind in ("dense", "tree")] + [f"--run={sweep}#wide"]
    outcome = call("benchmark_models", "train", *runs, "--seconds=0", f"--results={results}")
    assert outcome.code == 0, outcome.err
    rows = {(row["row"], row["metric"]): row["value"] for row in load_results(str(results))}
    assert rows["smoke_kinddense", "ratio_to_first"] == 1.0
    ratio = rows["smoke_kinddense", "time_ms"] / rows["smoke_kindtree", "time_ms"]
    assert rows["smoke_kindtree", "ratio_to_first"] == pytest.approx(ratio)
    assert ("sweep_wide", "time_ms") in rows
    assert ("smoke_kindtree", "counting") in rows and ("smoke_kinddense", "counting") not in rows


def test_a_row_of_a_sweep_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = tmp_path / "sweep.py"
    sweep.write_text(SWEEP)
    config = load_config(f"{sweep}#wide")
    assert (config.ffn.kind, config.ffn.node_width, config.seed) == ("tree", (2,), 3)


@pytest.mark.parametrize(
    "given,said",
    [
        ([], "--run is missing"),
        (["--run=configs/absent.py"], "'configs/absent.py' is no config file"),
        (["--run=README.md"], "'README.md' is no config file"),
        (["--run=configs/sweeps/t1.py#dense_15"], "use one of"),
        (["--run=configs/smoke.py:kin=dense"], "'kin=dense' is not known"),
        (["--run=configs/smoke.py", "--vocab=1"], "--vocab: 1 is not allowed"),
        (["write", "--run=configs/smoke.py"], "suite: 'write' is not known; use one of"),
        (["decode", "--run=configs/smoke.py", "--batch=0"], "--batch: 0 is not allowed"),
        (["decode", "--run=configs/smoke.py", "--new=100"], "do not fit the model's context"),
    ],
)
def test_bad_input_is_one_sentence(given, said):
    outcome = call("benchmark_models", *given)
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.strip().splitlines()) == 1
