"""Path flags of all programs: that there is no plain string among them, and what they do with a path."""

import ast

import pytest

from tests.experiments.programs import call
from tests.training.tiny import write_texts

# Flags that hold text and name no file. A new string flag is one of them, or is made by `path_flags`.
TEXT = {
    "activation", "answer_field", "api_key", "begins_with", "dtype", "expert_widths", "gpus",
    "hf_batches", "host", "hosts", "image", "implementations", "launch", "method", "methods", "mount",
    "name", "node_width", "param_dtype", "passes", "prompt", "queue", "refits", "revision", "router",
    "routing", "row", "rows", "run", "seeds", "select", "set", "shapes", "shots", "step", "stop",
    "submit", "table", "tasks", "text_field", "texts", "tfds_name", "thresholds", "title", "tokens",
    "topology", "widths",
}  # fmt: skip


def defined(repository):
    """(program, function that makes the flag, its name) of every flag of experiments/."""
    for path in sorted((repository / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                name, module = node.args[0], node.func.value
                if isinstance(name, ast.Constant) and isinstance(module, ast.Name):
                    yield path.stem, f"{module.id}.{node.func.attr}", name.value


def test_no_path_is_a_plain_string(repository):
    plain = ("flags.DEFINE_string", "flags.DEFINE_list", "flags.DEFINE_multi_string", "flags.DEFINE")
    found = {name for _, kind, name in defined(repository) if kind in plain}
    assert found <= TEXT, "each is made by path_flags, or named in TEXT"


def test_every_path_flag_refuses_what_is_elsewhere(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {
        "path_flags.define",
        "path_flags.define_written",
        "path_flags.define_each",
        "path_flags.define_list",
    }
    of_group = {"text_flags": "prune"}  # a program that has them
    flags = [
        (of_group.get(program, program), name) for program, kind, name in defined(repository) if kind in paths
    ]
    assert len(flags) > 60 and len({program for program, _ in flags}) > 15
    for program, name in flags:
        outcome = call(program, f"--{name}=gs://bucket/x")
        assert outcome.code == 2, (program, name, outcome)
        said = (
            f"{program}.py: --{name}: 'gs://bucket/x' is not on this machine; mount it, or copy it here, and "
        )
        assert outcome.err == f"{said}name a local path.\n"
    for path in ("s3://bucket/x", "gs://bucket"):  # which is no place in a bucket
        outcome = call("train", f"--workdir={path}")
        assert outcome.code == 2 and f"train.py: --workdir: {path!r} is not on this machine" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", ["gs://bucket/smoke.py", "~no_such_user/smoke.py"])
def test_a_config_file_is_a_path_too(config):
    for words in ([f"--config={config}"], ["--config", config]):
        outcome = call("train", *words, "--workdir=x")
        assert outcome.code == 2 and outcome.err.startswith(f"train.py: --config: {config!r} ")


def test_home_in_flags_and_config(tmp_path, monkeypatch, repository):
    """A run in ~, of a config file in ~, read again by another program."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "smoke.py").write_text((repository / "configs/smoke.py").read_text())
    (home / "texts").mkdir()
    write_texts(home / "texts")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    outcome = call(
        "train", "--config=~/smoke.py:kind=narrow", "--workdir=~/run", "--config.data.files=~/texts/*.txt",
        "--config.data.cache_dir=~/cache", "--config.train.steps=2", "--config.train.probe=False",
        "--config.mesh.data=1", "--results=~/rows.jsonl", "--row=tree",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {"cache", "rows.jsonl", "run", "smoke.py", "texts"} == {path.name for path in home.iterdir()}
    assert call("evaluate", "--workdir=~/run", "--batch_size=8", "--json=~/out.json").code == 0
    assert (home / "out.json").exists() and [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_name_of_packing_that_is_not_done_is_refused(repository, tmp_path):
    """Else the file could not be read again, by its name."""
    written = [
        (program, name) for program, kind, name in defined(repository) if kind == "path_flags.define_written"
    ]
    assert {program for program, name in written if name == "results"} >= {"train", "evaluate", "ablate"}
    for program, name in written:
        outcome = call(program, f"--{name}={tmp_path}/a.JSONL.GZ")
        assert outcome.code == 2 and outcome.err.startswith(
            f"{program}.py: --{name}: '{tmp_path}/a.JSONL.GZ'"
        )
        assert "would not be packed; use a name without .gz" in outcome.err
