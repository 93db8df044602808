"""Steps that are skipped change nothing, and weights in 16 bits learn as those of 32."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.tiny import tiny_config
from tree_ffn.errors import InputError
from tree_ffn.training.checkpoint_files import steps_on_disk
from tree_ffn.training.guards import WINDOW, skipping, with_master
from tree_ffn.training.loop import train
from tree_ffn.training.optimizer import OptimSpec
from tree_ffn.training.signals import Diverged


def run(texts, workdir, **changes):
    said = []
    figures = train(tiny_config(texts, "dense", **changes), str(workdir), log=said.append, bar=False)
    return figures, said


@pytest.mark.parametrize("loss,grad,made", [(1.1, 1.0, True), (9.0, 1.0, False), (1.0, 9.0, False),
                                            (np.nan, 1.0, False), (1.0, np.inf, False)])  # fmt: skip
def test_what_is_skipped_leaves_everything_as_it_is(loss, grad, made):
    optimizer, params = skipping(optax.adam(0.1), above=6.0), {"w": jnp.float32(3.0)}

    @jax.jit
    def update(state, loss, grad):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update({"w": grad}, state, params, loss=loss)

    state, noise = optimizer.init(params), np.random.default_rng(0).normal(1.0, 0.1, WINDOW)
    for number in noise.astype(np.float32):
        _, state = update(state, number, number)
    assert (int(state.made), int(state.skipped)) == (WINDOW, 0)

    updates, after = update(state, np.float32(loss), np.float32(grad))
    assert (float(updates["w"]) != 0, int(after.in_a_row), int(after.skipped)) == (made, not made, not made)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after.inner, state.inner)
    assert all(jax.tree.leaves(same)) != made
    _, again = update(after, np.float32(1.0), np.float32(1.0))
    assert (int(again.in_a_row), int(again.skipped)) == (0, not made)


def test_updates_that_are_too_small_for_16_bits_add_up():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    plain, master = optax.sgd(1.0), with_master(optax.sgd(1.0))
    lost, kept = (params, plain.init(params)), (params, master.init(params))
    for _ in range(64):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0**-11), params)
        moved = []
        for optimizer, (weights, state) in ((plain, lost), (master, kept)):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state, weights)
                moved.append((optax.apply_updates(weights, updates), state))
        lost, kept = moved
    assert lost[0]["w"].tolist() == [1.0] * 3 and kept[0]["w"].dtype == jnp.bfloat16
    assert kept[0]["w"].tolist() == [1 - 64 * 2.0**-11] * 3 == kept[1].master["w"].tolist()


def test_a_run_skips_what_is_not_finite_and_gives_up_in_time(texts, tmp_path):
    """At this rate every update is infinite: all are skipped, so the weights stay those of the start."""
    wild = {"optim__lr": 1e38, "optim__clip_norm": 0.0, "optim__weight_decay": 1e38, "optim__skip_above": 6.0}
    said = []
    config = tiny_config(texts, "dense", steps=9, optim__skip_at_most=4, **wild)
    with pytest.raises(Diverged, match="step 5: 5 steps in a row would have been skipped.* is 4;"):
        train(config, str(tmp_path), log=said.append, bar=False)
    assert [line for line in said if "skipped" in line][-1].endswith("; 4 so far")
    assert any("step 3: validation loss 5" in line for line in said)
    assert steps_on_disk(str(tmp_path / "checkpoints")) == [3]


@pytest.mark.slow
def test_a_run_with_guards_goes_on_as_the_straight_one(texts, tmp_path):
    guarded = {
        "optim__skip_above": 6.0, "optim__master_weights": True, "model__param_dtype": "bfloat16",
        "train__grad_accum_steps": 2,
    }  # fmt: skip
    straight, _ = run(texts, tmp_path / "straight", steps=6, **guarded)
    shutil.rmtree(tmp_path / "straight/checkpoints/6")
    again, said = run(texts, tmp_path / "straight", steps=6, **guarded)
    assert "resumed at step 3 of 6" in said and again["loss"] == straight["loss"] and again["skipped"] == 0


@pytest.mark.parametrize(
    "field,value", [("skip_above", -1.0), ("skip_above", float("nan")), ("skip_at_most", 0)]
)
def test_what_is_refused(field, value):
    with pytest.raises(InputError, match=f"optim.{field}: {value!r} is not allowed"):
        OptimSpec(steps=10, **{field: value})
