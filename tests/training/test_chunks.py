"""The loss by chunks of positions, against scores of all positions and plain differentiation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import random_batch, tiny_model
from tree_ffn.models.transformer import Transformer
from tree_ffn.training import chunks, sharding
from tree_ffn.training.losses import next_token_loss

BATCH = random_batch(rows=8, context=32)
DENSE = tiny_model("dense", model__n_layers=1)
PADDED = dataclasses.replace(DENSE, vocab_multiple=64)
MODELS = {
    "tied": DENSE,
    "tied-padded": PADDED,
    "own-padded": dataclasses.replace(PADDED, tied_head=False),
    "tied-padded-bfloat16": dataclasses.replace(PADDED, dtype="bfloat16"),
    "own-bfloat16": dataclasses.replace(DENSE, tied_head=False, dtype="bfloat16"),
}


def plain_loss(model, variables, batch):
    """Mean cross-entropy of the scores [B, C, V] of the model."""
    logits, infos = Transformer(model).apply(variables, batch[:, :-1])
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, batch[:, 1:, None], axis=-1)[..., 0]
    return nll.mean(), nll, infos


def with_gradients(loss, model, variables, batch, factor=1.0):
    """((factor * loss, cross-entropies), gradients) of all parameters."""

    def scaled(params):
        mean, nll, _ = loss(model, {**variables, "params": params}, batch)
        return factor * mean, nll

    return jax.jit(jax.value_and_grad(scaled, has_aux=True))(variables["params"])


@functools.cache
def variables_of(model):
    return jax.jit(Transformer(model).init)(jax.random.key(0), BATCH[:, :-1])


def assert_close(got, wanted, share):
    """Every array within a share of its largest entry."""
    apart = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())
    jax.tree.map(apart, got, wanted)


def positions(n):
    """The constant by which chunks of the batch have n positions."""
    return n * len(BATCH) * DENSE.vocab_size + 1


@functools.cache
def wanted_of(model):
    return with_gradients(plain_loss, model, variables_of(model), BATCH, factor=0.5)


@pytest.mark.parametrize(
    "name,length",
    [
        *((name, 5) for name in MODELS if name != "tied-padded-bfloat16"),
        pytest.param("tied-padded-bfloat16", 5, marks=pytest.mark.slow),  # each of the three is shown alone
        *(("tied", 32), ("own-padded", 32), ("tied", 8), ("tied", 0)),
    ],
)
def test_loss_and_all_gradients_are_those_of_all_scores(name, length, monkeypatch):
    """Of one chunk; of several, the last filled up; of whole ones; of one position each."""
    model, wanted = MODELS[name], wanted_of(MODELS[name])
    if length < 32:
        monkeypatch.setattr(chunks, "CHUNK", positions(length))
    got = with_gradients(next_token_loss, model, variables_of(model), BATCH, factor=0.5)
    exact = model.dtype == "float32"
    assert_close(got[0], wanted[0], 1e-6 if exact else 1e-3)
    assert_close(got[1], wanted[1], 2e-6 if exact else 2**-7)
    head = got[1]["embed"]["tokens" if model.tied_head else "head"]
    assert not jnp.any(head[model.vocab_size :])


def loops(jaxpr):
    """Lengths of the loops of a program, those within others too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        for part in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            if hasattr(part, "jaxpr"):
                yield from loops(part.jaxpr)


@pytest.mark.parametrize("length,n_chunks", [(16, 2), (13, 3), (1, 32)])
def test_chunks_are_as_long_as_the_constant_allows(length, n_chunks, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", positions(length))
    jaxpr = jax.make_jaxpr(functools.partial(next_token_loss, DENSE))(variables_of(DENSE), BATCH)
    assert n_chunks in list(loops(jaxpr.jaxpr))


def compiled_gradient(model, mesh=None):
    """The compiled gradient of the loss; on a mesh with the parameters where the table says."""
    shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), BATCH[:, :-1])["params"]
    batch = jax.ShapeDtypeStruct(BATCH.shape, jnp.int32)
    loss = lambda params, batch: next_token_loss(model, {"params": params, "routing": {}}, batch)[0]
    if mesh is None:
        return jax.jit(jax.grad(loss)).lower(shapes, batch).compile()
    places = sharding.shardings_for(shapes, mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(
            jax.grad(loss), in_shardings=(places, sharding.batch_sharding(mesh)), out_shardings=places
        )
        return run.lower(shapes, batch).compile()


def test_no_scores_of_all_positions_are_held(monkeypatch):
    model = dataclasses.replace(DENSE, vocab_size=1 << 14)
    all_scores = BATCH[:, 1:].size * model.vocab_size * 4

    def room():
        memory = compiled_gradient(model).memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert room() > all_scores
    monkeypatch.setattr(chunks, "CHUNK", all_scores // 4 // 16)
    assert room() < all_scores / 2


def test_devices_gather_the_head_and_add_up_its_gradient_once(monkeypatch):
    """No loop over chunks sends anything."""
    monkeypatch.setattr(chunks, "CHUNK", positions(4) // 8)
    text = compiled_gradient(dataclasses.replace(DENSE, scan=False), sharding.make_mesh(8, 1)).as_text() or ""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    in_loops = [part for part in computations if part.split()[0].removeprefix("%") in bodies]
    sends = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")
    assert in_loops and not any(map(sends.search, in_loops))
    assert {"all-reduce", "all-gather"} <= set(sends.findall(text))


@pytest.mark.parametrize("data,model", [(4, 2), (1, 8), (8, 1)])
def test_a_mesh_changes_nothing(data, model, monkeypatch):
    wide = MODELS["own-padded"]
    variables, wanted = variables_of(wide), wanted_of(wide)
    monkeypatch.setattr(chunks, "CHUNK", positions(6) // 8)
    mesh = sharding.make_mesh(data, model)
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, sharding.shardings_for(variables, mesh))
        got = with_gradients(next_token_loss, wide, placed, sharding.put_batch(BATCH, mesh), factor=0.5)
    assert_close(jax.device_get(got), wanted, 2e-6)
