"""Rows of results: whole, checked, appended, superseded, and free of this machine's paths."""

import json
import pathlib

import pytest

from experiments.reporting import record
from experiments.reporting import results_file as result_lines
from tree_ffn.errors import InputError
from tree_ffn.upgrades import upgraded

ROW = {
    "table": "cpu_small", "row": "tree_hard_P12_W1", "metric": "val_loss", "value": 1.5, "seed": 0,
    "config": {"model": {"width": 128}, "seed": 0}, "command": "python -m experiments.train",
}  # fmt: skip

PLAIN = ROW | {"config": {"model": {"width": 128}}}


def test_a_row_has_every_field(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    row = record.append_result(str(path), **ROW)
    assert record.load_results(str(path)) == [row | {"config": upgraded(row["config"])}]
    assert {*row} == {*record.FIELDS}
    assert row["unit"] == "nats/token" and row["device"] == "cpu" and row["versions"]["jax"]


def test_rows_are_appended_and_the_later_one_counts(tmp_path):
    path = str(tmp_path / "results.jsonl")
    for value in (1.5, 1.25):
        record.append_result(path, **ROW | {"value": value})
        record.append_result(path, **ROW | {"value": value + 1, "seed": 1})
    record.append_result(path, **ROW | {"config": {"model": {"width": 256}}})
    assert pathlib.Path(path).read_text().count("\n") == 5 + 3  # and each config once
    rows = record.load_results(path)
    assert [(row["seed"], row["value"]) for row in rows] == [(0, 1.25), (1, 2.25), (0, 1.5)]


def test_a_run_is_a_line_and_its_config_another(tmp_path):
    """Seeds share a config; another text, an own unit and metrics without a seed stand in the run's line."""
    path, figures = tmp_path / "results.jsonl", {"loss": 1.0, "ppl": 2.7, "tokens_per_s": 9.0}
    names = {"table": "cpu_small", "row": "dense", "data_meta": {"sha256": "abc"}}
    for seed in (0, 1):
        known = names | {"config": {"seed": seed, "data": {"corpus": "files"}, "train": {"steps": 3}}}
        record.append_figures(str(path), figures, **known)
        record.append_text_figures(str(path), "novels", {"loss": 2.0}, **known, sha256="def")
    record.append_result(str(path), **ROW | {"metric": "taste", "unit": "spoons"})
    found = record.load_results(str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sorted(line.get("metrics", line.keys())) for line in lines] == [
        ["config", "id"], ["ppl", "val_loss"], ["novels_loss"], ["ppl", "val_loss"], ["novels_loss"],
        ["config", "id"], ["taste"],
    ]  # fmt: skip
    assert lines[1]["seedless"] == {"tokens_per_s": 9.0} and lines[-1]["units"] == {"taste": "spoons"}
    assert [(row["metric"], row["seed"], row["config"]["seed"]) for row in found] == [
        ("val_loss", 0, 0), ("ppl", 0, 0), ("novels_loss", 0, 0),
        ("val_loss", 1, 1), ("ppl", 1, 1), ("tokens_per_s", None, 1), ("novels_loss", 1, 1), ("taste", 0, 0),
    ]  # fmt: skip
    assert found[-1]["unit"] == "spoons"
    assert {row["config"].get("scored", {}).get("sha256") for row in found} == {None, "def"}


def test_lines_of_the_older_form_are_read_and_rewritten(tmp_path):
    path = tmp_path / "old.jsonl"
    rows = [record.make_row(**PLAIN | {"seed": seed, "metric": "ppl"}) for seed in (0, 1)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    before = record.load_results(str(path))
    assert [row["config_hash"] for row in before] == [row["config_hash"] for row in rows]
    result_lines.rewrite(str(path))
    assert record.load_results(str(path)) == before and '"value"' not in path.read_text()


def test_a_torn_line_is_kept_apart_and_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"table": "cpu_sm')
    record.append_result(str(path), **ROW)
    lines = path.read_text().splitlines()
    assert lines[0] == '{"table": "cpu_sm' and json.loads(lines[2])["metrics"] == {"val_loss": 1.5}
    with pytest.raises(InputError, match="results.jsonl, line 1:"):
        record.load_results([str(path)])


@pytest.mark.parametrize(
    "change,said",
    [
        ({"table": "the best"}, "table 'the best' is not allowed; use letters, digits"),
        ({"row": "a row"}, "row 'a row' is not allowed"),
        ({"value": float("nan")}, "value nan is not allowed"),
        ({"value": "1.5"}, "value '1.5' is not allowed"),
        ({"metric": "taste"}, "unit None is not allowed"),
        ({"seed": True}, "seed True is not allowed"),
        ({"config": {"data": {"files": "/home/me/texts/a.txt"}}}, "'/home/me/texts/a.txt' is a path"),
        ({"command": "python x --files=/data/a/b"}, "'/data/a/b' is a path"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_written(tmp_path, change, said):
    path = tmp_path / "results.jsonl"
    with pytest.raises(InputError, match=said):
        record.append_result(str(path), **ROW | change)
    assert not path.exists()


def test_the_hash_is_of_the_config_without_its_seed():
    first = record.config_hash({"seed": 0, "a": {"b": 1}})
    assert first == record.config_hash({"a": {"b": 1}, "seed": 1}) != record.config_hash({"a": {"b": 2}})


def test_data_are_named_by_content():
    config = {
        "seed": 0,
        "data": {"corpus": "files", "files": "/x/*.txt", "valid_share": 0.1, "text_field": "text"},
    }
    meta = {"corpus": "files", "sha256": "abc", "tokenizer": "bytes", "directory": "/x/cache"}
    found = record.public_config(config, meta)
    assert found["data"] == {
        "corpus": "files", "valid_share": 0.1, "text_field": "text", "sha256": "abc", "tokenizer": "bytes",
    }  # fmt: skip


def test_models_that_a_run_began_with_are_not_named_by_their_place():
    config = {"data": {}, "finetune": {"start": "/x/trees", "teacher": "/x/dense", "kl": 1.0}}
    assert record.public_config(config, {})["finetune"] == {"kl": 1.0}


def test_commands_name_no_directory_of_this_machine():
    command = record.public_command(
        ["/x/experiments/train.py", "--a=/x/y/b.txt,/z/c", "--d=configs/e.py", "/f/g"]
    )
    assert command == "python -m experiments.train --a=PATH/b.txt,PATH/c --d=configs/e.py PATH/g"


def test_per_layer_figures_become_their_mean(tmp_path):
    path = tmp_path / "results.jsonl"
    config = {"seed": 3, "data": {"corpus": "files", "valid_share": 0.1, "text_field": "text"}}
    figures = {"loss": 1.0, "dead_leaves/0": 0.25, "dead_leaves/1": 0.75, "tokens_per_s": 9.0, "tokens": 10}
    record.append_figures(str(path), figures, table="cpu_small", row="dense", config=config, data_meta={})
    rows = {row["metric"]: (row["value"], row["seed"]) for row in record.load_results(str(path))}
    assert rows == {"val_loss": (1.0, 3), "dead_leaves": (0.5, 3), "tokens_per_s": (9.0, None)}


@pytest.mark.parametrize("bad", [float("nan"), "1.5"])
def test_figures_of_a_text_are_written_whole_or_not_at_all(tmp_path, bad):
    path = tmp_path / "results.jsonl"
    config = {"seed": 3, "data": {"corpus": "files", "valid_share": 0.1, "text_field": "text"}}
    names = {"table": "t1_small", "row": "dense", "config": config, "data_meta": {}, "sha256": "abc"}
    with pytest.raises(InputError, match="value .* is not allowed"):
        record.append_text_figures(str(path), "novels", {"loss": 1.0, "bits_per_byte": bad}, **names)
    assert not path.exists()
    record.append_text_figures(str(path), "novels", {"loss": 1.0, "bits_per_byte": 0.5}, **names)
    rows = {row["metric"]: (row["value"], row["unit"], row["seed"]) for row in record.load_results(str(path))}
    assert rows == {"novels_loss": (1.0, "nats/token", 3), "novels_bits_per_byte": (0.5, "bits/byte", 3)}
