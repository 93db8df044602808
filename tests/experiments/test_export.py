"""From a trained run to an export and to text: the two ways to the same model say the same."""

import pytest

from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.models import export
from tree_ffn.training.loop import train
from tree_ffn.training.restore import restore_for_inference


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """Workdir of a run with a checkpoint in the middle and one at the end."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(texts, kind="tree", train__checkpoint_every=3, train__eval_every=3)
    train(config, str(workdir), log=lambda _: None, bar=False)
    return workdir


def test_an_export_makes_the_text_of_the_run(run, tmp_path):
    to = tmp_path / "exported"
    outcome = call("export", f"--workdir={run}", f"--to={to}")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in to.iterdir()} == {export.WEIGHTS, export.CONFIG}
    asked = ("--prompt=a b", "--tokens=8", "--temperature=0.9", "--seed=1")
    of_run, of_export = (
        call("generate", source, *asked) for source in (f"--workdir={run}", f"--export={to}")
    )
    assert of_run.code == of_export.code == 0, of_run.err + of_export.err
    assert of_run.out.startswith("a b") and of_export.out == of_run.out


def test_any_step_can_be_exported(run, tmp_path):
    outcome = call("export", f"--workdir={run}", f"--to={tmp_path}/early", "--step=3")
    assert outcome.code == 0, outcome.err
    spec, variables, _ = export.load(f"{tmp_path}/early")
    expected = restore_for_inference(str(run), 3)
    assert spec == expected.model
    w_in = lambda variables: variables["params"]["run_0"]["ffn"]["w_in"]
    assert (w_in(variables) == w_in(expected.variables)).all()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--to=x"], "--workdir is missing"),
        (["--workdir={}"], "--to is missing"),
        (["--workdir={}", "--to=x", "--step=7"], "step: 7 has no checkpoint"),
        (["--workdir={}", "--to=x", "--dtype=float32"], "--dtype: 'float32' is of --format=hf; give both"),
    ],
)
def test_mistakes_get_one_sentence(run, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call("export", *(flag.format(run) for flag in flags))
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
    assert not (tmp_path / "x").exists()
