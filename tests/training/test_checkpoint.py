"""Checkpoints come back bit for bit, on any mesh, or say what is wrong; old ones are never damaged."""

import errno
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.kinds import random_variables
from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.models.from_config import model_spec_from_config
from tree_ffn.training import sharding
from tree_ffn.training.checkpoint import Checkpoints
from tree_ffn.training.checkpoint_files import disk_error, steps_on_disk
from tree_ffn.training.plan import resolved
from tree_ffn.training.restore import restore_for_inference
from tree_ffn.training.step import TrainState
from tree_ffn.upgrades import stamped

META = {"config": stamped({"ffn": {"node_width": [1, 2]}, "flag": True}), "data": {"sha256": "abc"}}


def make_state(step=3, trees=2, width=16):
    """A state without a model: an FFN's weights, thresholds, and Adam's moments."""
    key = jax.random.key(step)
    params = {"run_0": {"ffn": {"w_in": jax.random.normal(key, (1, trees, 7, width))}}}
    routing = {"run_0": {"ffn": {"threshold": jnp.arange(trees * 7.0).reshape(1, trees, 7)}}}
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
    return TrainState(jnp.int32(step), params, routing, optimizer.init(params))


def abstract(state, mesh=None):
    return sharding.placed(jax.eval_shape(lambda: state), mesh or sharding.make_mesh(1, 1))


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for leaf, leaf_2 in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == leaf_2.dtype
        np.testing.assert_array_equal(leaf, leaf_2)


def test_everything_comes_back(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        restored, meta = checkpoints.restore(abstract(state))
    assert_same(restored, state)
    assert meta == {**META, "step": 3}


def test_a_donated_state_may_be_overwritten_at_once(tmp_path):
    state, kept = make_state(), jax.device_get(make_state())
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract(kept))
    assert_same(restored, kept)


@pytest.mark.parametrize("data,model", [(4, 2), (8, 1), (1, 2)])
def test_another_mesh(tmp_path, data, model):
    state = make_state(trees=1)
    mesh = sharding.make_mesh(data, model)
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract(state, mesh))
    assert_same(restored, state)
    found = restored.params["run_0"]["ffn"]["w_in"].sharding
    assert found == abstract(state, mesh).params["run_0"]["ffn"]["w_in"].sharding


def test_the_latest_and_the_best_stay(tmp_path):
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
            checkpoints.save(make_state(step), META, val_loss)
        checkpoints.wait()
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        assert (checkpoints.best, checkpoints.latest) == (2, 5)
        assert [checkpoints.find(name) for name in ("best", "latest", 4, "4")] == [2, 5, 4, 4]
        with pytest.raises(
            InputError, match=r"step: 3 has no checkpoint; use best, latest or one of \[2, 4, 5\]"
        ):
            checkpoints.find(3)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"width": 8}, r"w_in of .*3 is float32\[1,2,7,16\]; this model needs float32\[1,2,7,8\]"),
        (
            {"trees": 4},
            r"params/run_0/ffn/w_in of .*/3 is float32\[1,2,7,16\]; this model needs float32\[1,4,7,16\]",
        ),
    ],
)
def test_another_shape_names_the_leaf(tmp_path, change, said):
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(make_state(), META)
        checkpoints.wait()
        with pytest.raises(InputError, match=said):
            checkpoints.restore(abstract(make_state(**change)))


def test_other_leaves_are_named(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
        for wanted, said in (
            (state._replace(routing={}), "has routing/run_0/ffn/threshold, float32"),
            (state._replace(routing=state.routing | {"run_1": jnp.zeros(2)}), "has no routing/run_1"),
            (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state), "this model needs bfloat16"),
        ):
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
            with pytest.raises(InputError, match=said):
                checkpoints.restore(shapes)


@pytest.mark.parametrize(
    "item,damage",
    [
        ("model", lambda path: [part.write_bytes(b"") for part in (path / "d").iterdir()]),
        ("model", lambda path: (path / "_METADATA").unlink()),
        ("optimizer", lambda path: (path / "_METADATA").write_bytes(b"")),
        ("model", shutil.rmtree),
    ],
    ids=["emptied", "no metadata", "empty metadata", "no item"],
)
def test_a_damaged_checkpoint_is_named(tmp_path, item, damage):
    state = make_state(2)
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
    damage(tmp_path / "checkpoints" / "2" / item)
    said = f"checkpoint: .*/checkpoints/2 cannot be read, its item '{item}' .* --step"
    with Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(InputError, match=said):
            checkpoints.restore(abstract(state))
        if item == "model":
            variables = {"params": state.params, "routing": state.routing}
            with pytest.raises(InputError, match=said):
                checkpoints.restore_variables(variables, 2)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    state = make_state(1)
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()

        def full(*_, **__):
            raise ValueError("Error writing: No space left on device [source locations]")

        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", full)
        with pytest.raises(
            InputError, match="cannot be written .No space left on device.; .* step 1 are whole"
        ):
            checkpoints.save(make_state(2), META)
        restored, _ = checkpoints.restore(abstract(state))
    assert_same(restored, state)


FULL_DISK = """
import resource, signal, sys
from tests.training.test_checkpoint import META, make_state
from tree_ffn.errors import InputError
from tree_ffn.training.checkpoint import Checkpoints

with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(make_state(1), META)
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing says EFBIG, and the process lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        checkpoints.save(make_state(2, width=4096), META)
        checkpoints.wait()
    except InputError as error:
        print(error)
        raise SystemExit(2)
"""


def test_a_save_that_really_fails_leaves_the_last_checkpoint_whole(tmp_path, repository):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.stdout == (
        f"workdir: {tmp_path}/checkpoints cannot be written (File too large); "
        "checkpoints up to step 1 are whole.\n"
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        assert checkpoints.steps == [1]
        restored, meta = checkpoints.restore(abstract(make_state(1)))
    assert_same(restored, make_state(1))
    assert meta == {**META, "step": 1}


def test_only_whole_checkpoints_count_on_disk(tmp_path):
    assert steps_on_disk(str(tmp_path / "nowhere")) == []
    for name in ("10", "9", "11.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "12").touch()
    assert steps_on_disk(str(tmp_path)) == [9, 10]


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written .Not a directory"):
        Checkpoints(str(tmp_path / "file"), keep=1)


def test_reading_makes_and_removes_nothing(tmp_path):
    with pytest.raises(InputError, match="has no checkpoints"):
        Checkpoints(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    unfinished = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    with Checkpoints(str(tmp_path)) as checkpoints, pytest.raises(InputError, match="no whole checkpoint"):
        checkpoints.find("latest")
    assert unfinished.exists()


def test_a_disk_error_is_found_among_causes():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("save failed") from error
    except RuntimeError as error:
        assert disk_error(error) == "No space left on device"
    assert disk_error(RuntimeError("something else")) is None


def test_inference_with_another_config_names_the_leaf(tmp_path, texts):
    config = resolved(tiny_config(texts))
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(make_state(), {"config": config, "data": {"vocab_size": 257}})
        checkpoints.wait()
    with pytest.raises(InputError, match="checkpoint: .* has no params/embed/positions"):
        restore_for_inference(str(tmp_path))


def test_inference_refuses_a_weight_that_is_no_finite_number(tmp_path, texts):
    config = tiny_config(texts)
    variables = random_variables(model_spec_from_config(config, 257))
    table = variables["params"]["embed"]["tokens"]
    variables["params"]["embed"]["tokens"] = table.at[5, 2].set(jnp.inf)
    state = TrainState(jnp.int32(0), **variables, opt_state=())
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, {"config": resolved(config), "data": {"vocab_size": 257}})
        checkpoints.wait()
    with pytest.raises(InputError, match=r"^checkpoint: params/embed/tokens in '.*/0' is inf at \[5, 2\]"):
        restore_for_inference(str(tmp_path))


@pytest.mark.parametrize("killed", ["before", "after"])
def test_what_is_replaced_is_there_until_the_other_is_whole(tmp_path, killed, monkeypatch):
    """A run that was stopped where a validation was due saves that step again, with its loss."""
    state, directory = make_state(2), tmp_path / "checkpoints"
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
        if killed == "before":
            monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", lambda *_, **__: 1 / 0)
        else:
            monkeypatch.setattr("shutil.rmtree", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(state, META, val_loss=1.5)
    monkeypatch.undo()
    assert "2.replaced" in os.listdir(directory)
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.check_newest(print)
        assert os.listdir(directory) == ["2"] and checkpoints.is_scored(2) == (killed == "after")
        restored, _ = checkpoints.restore(abstract(state))
        assert_same(restored, state)


@pytest.mark.parametrize("damage", ["_CHECKPOINT_METADATA", "model/d", "optimizer"])
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, damage):
    said = []
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), META)
    path = tmp_path / "checkpoints" / "2" / damage
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.check_newest(said.append)
        assert_same(checkpoints.restore_newest(abstract(make_state(1)), said.append), make_state(1))
        assert checkpoints.steps == [1]
    (line,) = said
    assert "checkpoints/2 cannot be read; it is now 2.damaged, and step 1 is used" in line
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "model")
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        with pytest.raises(InputError, match="checkpoints/1 cannot be read, and there is no other"):
            checkpoints.restore_newest(abstract(make_state(1)), said.append)
