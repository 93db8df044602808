"""Schedules, decay by name, and one AdamW step by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.tiny import tiny_model
from tree_ffn.errors import InputError
from tree_ffn.models.transformer import Transformer
from tree_ffn.training.optimizer import OptimSpec, decay_mask, learning_rate, make_optimizer
from tree_ffn.training.sharding import path_name


def rates(**fields):
    spec = OptimSpec(**({"steps": 10, "lr": 1.0} | fields))
    return np.array([float(learning_rate(spec)(i)) for i in range(spec.steps + 1)])


def test_constant_after_a_linear_rise():
    np.testing.assert_allclose(rates(schedule="constant", warmup_steps=4), [0.25, 0.5, 0.75] + [1.0] * 8)


def test_cosine_ends_at_its_final_share():
    cosine = rates(schedule="cosine", warmup_steps=2, final_share=0.2)
    done = np.arange(9) / 8
    np.testing.assert_allclose(cosine[2:], 0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2, rtol=1e-6)
    np.testing.assert_allclose(cosine[:2], [0.5, 1.0])


def test_wsd_is_constant_and_then_linear():
    wsd = rates(schedule="wsd", final_share=0.5, decay_share=0.4)
    np.testing.assert_allclose(wsd, [1.0] * 7 + [0.875, 0.75, 0.625, 0.5])


def test_a_rate_is_the_same_for_an_array_of_steps():
    schedule = learning_rate(OptimSpec(steps=10, lr=1e-3, warmup_steps=3))
    together = schedule(np.arange(10, dtype=np.float32))
    np.testing.assert_allclose(together, [schedule(i) for i in range(10)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["tree", "random_tree", "dense", "leaf"])
def test_matrices_decay_and_nothing_else(kind):
    model = dataclasses.replace(tiny_model(kind), tied_head=kind != "dense")
    shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    flat, _ = jax.tree_util.tree_flatten_with_path(decay_mask(shapes["params"]))
    decayed = {path_name(path) for path, decays in flat if decays}
    kept = {path_name(path) for path, decays in flat if not decays}
    names = {name.split("/")[-1] for name in decayed}
    assert {"tokens", "positions", "w_qkv", "w_in", "w_out"} <= names <= {
        "tokens", "head", "positions", "w_qkv", "w_in", "w_out", "w_router",
    }  # fmt: skip
    assert ("head" in names) == (kind == "dense")
    assert {name.split("/")[-1] for name in kept} <= {"bias", "scale", "b_in", "b_out", "b_qkv", "b_router"}
    assert not any("threshold" in name for name in decayed | kept)


def test_an_unknown_parameter_has_no_silent_rule():
    with pytest.raises(KeyError, match="ffn/gamma"):
        decay_mask({"ffn": {"gamma": 0.0}})


def test_two_steps_by_hand(rng):
    """Two: in the first step means of any b1 and b2 are the gradient and its square."""
    spec = OptimSpec(steps=10, lr=0.1, schedule="constant", b1=0.9, b2=0.99, weight_decay=0.2, clip_norm=1.0)
    params = {"w_in": rng.normal(size=(3, 2)).astype(np.float32), "b_in": np.ones(3, np.float32)}
    first = {"w_in": np.full((3, 2), 3.0, np.float32), "b_in": np.full(3, 4.0, np.float32)}
    second = {"w_in": np.full((3, 2), -0.1, np.float32), "b_in": np.full(3, 0.2, np.float32)}  # not clipped
    optimizer, new, norm = make_optimizer(spec), params, np.sqrt(6 * 9.0 + 3 * 16.0)
    state, by_hand, update = optimizer.init(params), dict(params), jax.jit(optimizer.update)
    mean, square = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for step, (grads, scale) in enumerate(((first, 1 / norm), (second, 1.0)), start=1):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, new)
        new = optax.apply_updates(new, updates)
        for name, decay in (("w_in", 0.2), ("b_in", 0.0)):
            clipped = grads[name] * scale
            mean[name] = 0.9 * mean[name] + 0.1 * clipped
            square[name] = 0.99 * square[name] + 0.01 * clipped**2
            moved = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8)
            by_hand[name] = by_hand[name] - 0.1 * (moved + decay * by_hand[name])
            np.testing.assert_allclose(new[name], by_hand[name], rtol=1e-5)


@pytest.mark.parametrize(
    "field,value",
    [
        ("lr", 0.0), ("lr", float("nan")), ("schedule", "linear"), ("warmup_steps", -1), ("warmup_steps", 11),
        ("b1", 1.0), ("b2", -0.1), ("eps", 0.0), ("final_share", 1.5), ("decay_share", -0.1),
        ("weight_decay", -1.0), ("clip_norm", -1.0),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(field, value):
    with pytest.raises(InputError, match=f"optim.{field}"):
        OptimSpec(**({"steps": 10, "lr": 1e-3} | {field: value}))
