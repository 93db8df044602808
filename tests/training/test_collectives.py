"""What devices send each other in a training step, read off the compiled program on eight fake devices.

A loop over layers counts once, so the models have one layer. Bytes are those of results on one device.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tree_ffn.models.spec import DenseSpec, ModelSpec
from tree_ffn.training import hlo, sharding, step
from tree_ffn.training.compiled import Scorer
from tree_ffn.training.optimizer import OptimSpec, learning_rate, make_optimizer
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec

E, C, B, V, F = 128, 64, 16, 1024, 512
LAYERS = {
    "dense": DenseSpec(F),
    "recipe": LeafSpec(n_experts=64, expert_width=8, top_k=4, gate_norm="rms"),
    "mixture": LeafSpec(n_experts=64, expert_width=8, top_k=4, router="softmax"),
    "path": TreeSpec(TreeShape(n_trees=8, depth=5)),
}
OTHERS = [kind for kind in LAYERS if kind != "recipe"]
SLOW = pytest.param("mixture", marks=pytest.mark.slow)  # its experts lie as the recipe's do
every_kind = pytest.mark.parametrize("kind", [*(kind for kind in LAYERS if kind != "mixture"), SLOW])
ACTIVATIONS = 4 * B * C * E  # of one layer's input, all tokens


def abstract_state(spec, optimizer, mesh):
    init = functools.partial(step.init_state, model=spec, optimizer=optimizer)
    return sharding.placed(jax.eval_shape(init, jax.random.key(0)), mesh)


@functools.cache
def compiled(kind, data, model, microbatches=1, sync="step"):
    """A program of steps of so many microbatches for so many devices, and the bytes of its matrices."""
    spec = ModelSpec(V, C, E, 1, 4, (LAYERS[kind],))
    optim = OptimSpec(steps=10)
    optimizer, mesh = make_optimizer(optim), sharding.make_mesh(data, model)
    one_step = functools.partial(
        step.train_step,
        model=spec,
        optimizer=optimizer,
        schedule=learning_rate(optim),
        accumulation=microbatches,
        sync=sync,
        steps=10,
    )
    with jax.set_mesh(mesh):
        state = abstract_state(spec, optimizer, mesh)
        shardings = jax.tree.map(lambda array: array.sharding, state)
        rows = sharding.batch_sharding(mesh)
        batch = jax.ShapeDtypeStruct((B * microbatches, C + 1), jnp.int32, sharding=rows)
        run = jax.jit(one_step, out_shardings=(shardings, None, None), donate_argnums=(0, 1))
        program = run.lower(state, step.empty_usage(spec), batch).compile()
    return program, sum(4 * array.size for array in jax.tree.leaves(state.params) if array.ndim > 1)


def sent(program, data, model) -> dict[str, list[int]]:
    """Bytes of the results of every collective, by kind; none is repeated."""
    found = collections.defaultdict(list)
    for one in hlo.collectives(hlo.read(program.as_text()), {"data": data, "model": model}):
        assert one.times == 1 and one.axes == (("data",) if data > 1 else ("model",))
        found[one.kind].append(one.bytes)
    return found


@every_kind
def test_over_data_weights_are_gathered_and_activations_stay(kind):
    """Each device holds an eighth of the state; it sends weights and gradients, not activations."""
    program, weights = compiled(kind, 8, 1)
    state = program.memory_analysis().argument_size_in_bytes
    assert 3 * weights / 8 < state < 1.25 * 3 * weights / 8
    found = sent(program, 8, 1)
    assert 0.8 * weights < sum(found["all-gather"]) < 2.5 * weights
    assert sum(found["all-reduce"]) + sum(found["reduce-scatter"]) < 1.1 * weights
    assert sum(found["all-to-all"]) + sum(found["collective-permute"]) < ACTIVATIONS


@every_kind
def test_evaluating_needs_less_memory_than_training(kind):
    """Of as many tokens at a time; the state that it reads is there anyway."""
    spec, mesh = ModelSpec(V, C, E, 1, 4, (LAYERS[kind],)), sharding.make_mesh(8, 1)
    variables = abstract_state(spec, make_optimizer(OptimSpec(steps=10)), mesh).variables
    batch = jax.ShapeDtypeStruct((B, C + 1), jnp.int32, sharding=sharding.batch_sharding(mesh))
    scorer = Scorer(spec, mesh)
    with jax.set_mesh(mesh):
        usage = jax.eval_shape(scorer.empty_usage)
        evaluating = scorer._eval_step.lower(variables, usage, batch, np.int32(B)).compile()
    temporaries = lambda program: program.memory_analysis().temp_size_in_bytes
    assert 0 < temporaries(evaluating) < temporaries(compiled(kind, 8, 1)[0])


@pytest.mark.parametrize("kind", ["recipe", "path", SLOW])
def test_over_model_a_layer_adds_up_outputs_as_a_dense_one_does(kind):
    """One sum of activations forward and one backward, as often as in dense; no weights are gathered."""
    of_kind, of_dense = (sent(compiled(name, 1, 8)[0], 1, 8) for name in (kind, "dense"))
    assert not of_kind["all-gather"] and not of_dense["all-gather"]
    whole = lambda found: sum(size // ACTIVATIONS for size in found["all-reduce"])
    assert whole(of_kind) == whole(of_dense) >= 4  # attention and the layer, forward and backward
    assert sum(of_kind["all-reduce"]) < 1.1 * sum(of_dense["all-reduce"])


def reduced(program) -> tuple[int, int]:
    """Bytes of what eight devices along "data" add up in a step, and the bytes of it that are in a loop."""
    found = [
        (one.bytes * one.times * (8 if one.kind == "reduce-scatter" else 1), one.times)
        for one in hlo.collectives(hlo.read(program.as_text()), {"data": 8, "model": 1})
        if one.kind in ("all-reduce", "reduce-scatter")
    ]
    return sum(size for size, _ in found), sum(size for size, times in found if times > 1)


@pytest.mark.parametrize("microbatches", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["recipe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_gradients_are_added_up_once_a_step(kind, microbatches):
    """Each once, whatever the microbatches; and weights are gathered once, not per layer and pass."""
    program, weights = compiled(kind, 8, 1, microbatches)
    found = sent(program, 8, 1)
    size, _ = reduced(program)
    assert size == pytest.approx(weights, rel=0.05)
    assert size == pytest.approx(reduced(compiled(kind, 8, 1)[0])[0], rel=0.05)
    assert sum(found["all-gather"]) == pytest.approx(weights, rel=0.05)
    assert not found["all-to-all"] and not found["collective-permute"]


def test_or_in_every_microbatch():
    """By `train.grad_sync=microbatch`, which holds no whole gradient beside the layers'."""
    program, weights = compiled("dense", 8, 1, 4, "microbatch")
    _, in_loop = reduced(program)
    assert in_loop > 3.9 * weights
