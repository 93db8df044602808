"""Which configs may go on in a workdir, and how the others are refused."""

import importlib.util
import json

import pytest

from tests.test_upgrades import OLD_FFN
from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.paths import replacing
from tree_ffn.plain import namespace
from tree_ffn.training import workdir as workdirs
from tree_ffn.training.loop import train
from tree_ffn.training.plan import TrainSpec, differing_keys, resolved


def check(texts, step, known=(), **changes):
    old = resolved(tiny_config(texts, **dict(known)))
    new = resolved(tiny_config(texts, **dict(known) | changes))
    workdirs.check_same_config("runs/a", old, new, step)


def test_how_and_where_it_runs_may_change(texts):
    check(
        texts, step=4, train__log_every=7, train__eval_every=9, train__eval_batches=3, train__keep=5,
        train__checkpoint_every=11, mesh__data=4, mesh__model=2, model__remat="full",
        ffn__implementation="masked", data__files="elsewhere/*.txt", data__cache_dir="x", data__workers=3,
    )  # fmt: skip


def test_what_it_computes_may_not(texts):
    with pytest.raises(InputError) as caught:
        check(texts, step=4, optim__lr=0.5, ffn__depth=2, seed=1, train__log_every=1)
    said = "ffn.depth (3 there, 2 here), optim.lr (0.001 there, 0.5 here), seed (0 there, 1 here)"
    assert str(caught.value) == (
        f"workdir: runs/a holds a run of another config; these keys differ: {said}; "
        "use its config, or another --workdir."
    )


@pytest.mark.parametrize(
    "schedule,step,allowed",
    [("constant", 6, True), ("cosine", 6, False), ("cosine", 1, True), ("wsd", 4, True), ("wsd", 6, False)],
)
def test_a_run_may_be_lengthened_if_its_past_stays(texts, schedule, step, allowed):
    known = {"optim__schedule": schedule, "optim__decay_share": 0.3}
    if allowed:
        check(texts, step, known, train__steps=12)
    else:
        with pytest.raises(InputError, match=r"train.steps \(6 there, 12 here\)"):
            check(texts, step, known, train__steps=12)


def test_a_lengthened_run_may_not_have_leaked_otherwise(texts):
    known = {"optim__schedule": "constant", "ffn__kind": "leaf", "ffn__dense_start": 0.5}
    check(texts, 1, known, train__steps=12)  # the first step leaks wholly, however many follow
    for step in (2, 6):
        with pytest.raises(InputError, match=r"train.steps \(6 there, 12 here\)"):
            check(texts, step, known, train__steps=12)
    check(texts, 6, known | {"ffn__dense_start": 0.0}, train__steps=12)  # what has no paths leaks nothing


def test_before_the_first_step_how_it_trains_is_open(texts):
    check(texts, step=0, optim__lr=0.5, optim__warmup=1, train__steps=12, train__batch_size=16)
    with pytest.raises(InputError, match=r"keys differ: ffn.depth \(3 there, 2 here\)"):
        check(texts, step=0, optim__lr=0.5, ffn__depth=2)


def test_other_data_are_refused():
    meta = {"sha256": "a", "tokenizer_sha256": "t", "row_tokens": 33, "splits": {}}
    workdirs.check_same_data("runs/a", meta, dict(meta))
    with pytest.raises(InputError, match="sha256 'a' there, 'b' here"):
        workdirs.check_same_data("runs/a", meta, meta | {"sha256": "b"})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    workdirs.write_json(str(tmp_path), "config.json", {"a": 1})
    (tmp_path / "config.json.new").mkdir()  # the next write cannot begin
    with pytest.raises(InputError, match="config.json cannot be written"):
        workdirs.write_json(str(tmp_path), "config.json", {"a": 2})
    assert workdirs.read_json(str(tmp_path), "config.json") == {"a": 1}
    assert workdirs.read_json(str(tmp_path), "data.json") is None


def test_a_file_stays_as_it_was_when_writing_it_fails(tmp_path):
    path = tmp_path / "leaves.npz"
    with replacing(str(path), "wb") as file:
        file.write(b"\xff")
    with pytest.raises(ZeroDivisionError), replacing(str(path), "wb") as file:
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"\xff"
    with pytest.raises(InputError, match=r"workdir: .*absent.* cannot be written \(No such file"):
        with replacing(str(tmp_path / "absent" / "leaves.npz")):
            pass


def test_every_start_is_kept(tmp_path):
    for step in (0, 4):
        workdirs.add_origin(str(tmp_path), {"step": step})
    assert workdirs.read_json(str(tmp_path), "origin.json") == {"starts": [{"step": 0}, {"step": 4}]}


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="config.json"):
        workdirs.read_json(str(tmp_path), "config.json")


def test_a_config_survives_json(texts):
    config = tiny_config(texts)
    plain = json.loads(json.dumps(resolved(config)))
    again = namespace(plain)
    assert resolved(again) == plain
    assert again.ffn.node_width == (1,) and again["optim"]["lr"] == config.optim.lr
    assert differing_keys(plain, resolved(config)) == {}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"^workdir: .*config\.json (cannot be read|holds no JSON object)"):
        workdirs.read_json(str(tmp_path), "config.json")


def begun_before(texts, tmp_path, **changes):
    """A workdir whose config.json is older than `config_version`."""
    config = resolved(tiny_config(texts, "tree"))
    config["ffn"] = OLD_FFN | {"kind": "tree", "n_trees": 2, "depth": 3, "node_width": [1]} | changes
    workdirs.write_json(str(tmp_path), "config.json", config)
    return str(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_bucket_needs_a_package(texts):
    with pytest.raises(InputError, match=r"gs://runs/tree needs the package gcsfs; install tree_ffn\[gcs\]"):
        train(tiny_config(texts), "gs://runs/tree", log=lambda _: None, bar=False)


def test_a_run_begun_before_a_key_was_added_goes_on_with_what_was_computed(texts, tmp_path):
    workdir = begun_before(texts, tmp_path)
    workdirs.open_workdir(workdir, tiny_config(texts, "tree"), TrainSpec(keep=1)).close()
    with pytest.raises(InputError, match=r"keys differ: ffn.balance_rate \(0.0 there, 0.5 here\)"):
        workdirs.open_workdir(workdir, tiny_config(texts, "tree", ffn__balance_rate=0.5), TrainSpec(keep=1))


@pytest.mark.parametrize("name, value", [("balance_floor", 0.2), ("routing", "continuous"), ("leak", 1.0)])
def test_a_run_that_used_an_option_that_is_gone_is_refused(texts, tmp_path, name, value):
    workdir = begun_before(texts, tmp_path, **{name: value})
    with pytest.raises(InputError, match=f"workdir: .*: ffn.{name} = {value!r} is no option any more"):
        workdirs.open_workdir(workdir, tiny_config(texts), TrainSpec(keep=1))
