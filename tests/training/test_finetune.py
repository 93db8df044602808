"""Losses against a teacher, what is trained and what is not, and layers that take over by degrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.kinds import KINDS, forward, model_spec, random_variables
from tree_ffn.errors import InputError
from tree_ffn.models import DenseSpec, Transformer
from tree_ffn.models.ffn import apply_ffn
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.training import chunks, finetune, step
from tree_ffn.training.finetune import (
    FinetuneSpec,
    check_teacher,
    finetune_loss,
    finetune_step,
    given_by,
    shares,
)
from tree_ffn.training.losses import token_losses
from tree_ffn.training.optimizer import OptimSpec, learning_rate, make_optimizer
from tree_ffn.training.step import TrainState

DENSE = model_spec(DenseSpec(24), DenseSpec(24))
TREES = model_spec(*(KINDS["hard"],) * 2)
ROWS = np.random.default_rng(0).integers(0, 23, (4, 17)).astype(np.int32)
ALL = FinetuneSpec(ce=0.5, kl=1.0, ffn=1.0)


@pytest.fixture(scope="module")
def teacher():
    return random_variables(DENSE, seed=1)


@pytest.fixture(scope="module")
def student():
    return random_variables(TREES, seed=2)


def loss_of(model, spec, given, teacher=DENSE, learn=False):
    """Compiled: (variables, rows, step) to (loss, nll), or to ((loss, nll), gradient)."""

    def loss(params, routing, rows, at):
        value, (nll, _) = finetune_loss(
            params, routing, rows, given, at, model=model, teacher=teacher, spec=spec
        )
        return value, nll

    def with_gradient(*args):
        (value, nll), grads = jax.value_and_grad(loss, has_aux=True)(*args)
        return (value, nll), grads

    run = jax.jit(with_gradient if learn else loss)
    return lambda variables, rows, at=0: run(
        variables["params"], variables.get("routing", {}), rows, jnp.int32(at)
    )


@functools.cache
def plain_loss(model):
    """The loss of training, compiled."""
    return jax.jit(functools.partial(step.loss_fn, model=model))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher):
    spec = FinetuneSpec(ce=0.0, kl=1.0, ffn=1.0)
    given = given_by(DENSE, DENSE, teacher, spec)
    (loss, nll), grads = loss_of(DENSE, spec, given, learn=True)(teacher, ROWS)
    assert abs(loss) < 1e-6 and nll > 1
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6


def test_the_losses_are_their_formulas(teacher, student):
    """Each part against NumPy in float64, on logits and layer outputs of separate forward passes."""
    value = {}
    for name in ("ce", "kl", "ffn"):
        spec = FinetuneSpec(**{"ce": 0.0, "kl": 0.0, "ffn": 0.0, name: 1.0})
        value[name], _ = loss_of(TREES, spec, given_by(TREES, DENSE, teacher, spec))(student, ROWS)
    forward = lambda model, v: jax.jit(
        functools.partial(Transformer(model).apply, mutable=["intermediates"])
    )(v, ROWS[:, :-1])
    (s, _), sown = forward(TREES, student)
    (t, _), _ = forward(DENSE, teacher)
    log_softmax = lambda a: (a := np.asarray(a, np.float64)) - np.log(np.exp(a).sum(-1, keepdims=True))
    s, t = log_softmax(s), log_softmax(t)
    np.testing.assert_allclose(value["ce"], -np.take_along_axis(s, ROWS[:, 1:, None], -1).mean(), rtol=1e-5)
    np.testing.assert_allclose(value["kl"], (np.exp(t) * (t - s)).sum(-1).mean(), rtol=1e-4)
    gaps = []
    (x,) = sown["intermediates"]["run_0"]["ffn"]["x"]
    for layer in range(2):
        of = lambda v, name, layer=layer: jax.tree.map(lambda a: a[layer], v[name]["run_0"]["ffn"])
        y, _ = jax.jit(apply_ffn, static_argnums=2)(
            {**of(student, "params"), **of(student, "routing")}, x[layer].reshape(-1, 16), TREES.ffns[0]
        )
        d, _ = jax.jit(apply_ffn, static_argnums=2)(
            of(teacher, "params"), x[layer].reshape(-1, 16), DENSE.ffns[0]
        )
        y, d = (np.asarray(out, np.float64).reshape(len(ROWS), -1) for out in (y, d))
        gaps.append((((y - d) ** 2).mean(axis=1) / (d**2).mean(axis=1)).mean())
    np.testing.assert_allclose(value["ffn"], np.mean(gaps), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatches_change_no_gradient(teacher, student, accumulation):
    """Of all three losses together: each is a mean over rows."""
    spec = FinetuneSpec(ce=1.0, kl=1.0, ffn=1.0)
    given = given_by(TREES, DENSE, teacher, spec)
    parts = {"model": TREES, "teacher": DENSE, "spec": spec}
    fixed = (given, jnp.int32(0))

    def loss(params, rows):
        value, (nll, _) = finetune_loss(params, student["routing"], rows, *fixed, **parts)
        return value, (nll, ())

    whole, split = (
        jax.jit(functools.partial(step.gradients, loss, dtype=jnp.float32, microbatches=n))(
            student["params"], ROWS
        )[0]
        for n in (1, accumulation)
    )
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / (jnp.abs(a).max() + 1e-9)), whole, split)
    assert max(jax.tree.leaves(apart)) < 1e-4


@pytest.mark.slow
def test_chunks_change_nothing(teacher, student, monkeypatch):
    """Of what is learned from targets and of a teacher, where some targets do not count."""
    rows = ROWS.copy()
    rows[1:, :9] = -1 - rows[1:, :9]
    given = given_by(TREES, DENSE, teacher, ALL)
    (whole, _), grads = loss_of(TREES, ALL, given, learn=True)(student, rows)
    monkeypatch.setattr(chunks, "CHUNK", 5 * len(ROWS) * TREES.vocab_size)
    (split, _), grads_split = loss_of(TREES, ALL, given, learn=True)(student, rows)
    np.testing.assert_allclose(split, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads_split, grads)


def test_plain_rows_have_the_loss_of_training(student):
    loss, _ = loss_of(TREES, FinetuneSpec(), {}, None)(student, ROWS)
    want, _ = plain_loss(TREES)(student["params"], student["routing"], ROWS)
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_prompts_are_read_and_not_learned(teacher, student):
    """Targets that do not count change nothing; the same ids as inputs still do."""
    rows = ROWS.copy()
    rows[:, :9] = -1 - rows[:, :9]
    rows[:, -3:] = -1 - rows[:, -3:]
    run = loss_of(TREES, FinetuneSpec(), {}, None, learn=True)
    (loss, _), grads = run(student, rows)
    logits, _ = forward(TREES)(student, ROWS[:, :-1])
    nll = np.asarray(token_losses(logits, ROWS[:, 1:]))
    np.testing.assert_allclose(loss, nll[:, 8:13].mean(), rtol=1e-5)
    other = rows.copy()
    other[:, -1] = -1 - (ROWS[:, -1] + 1) % 23  # never read, and not counted as a target
    (same, _), same_grads = run(student, other)
    assert same == loss
    jax.tree.map(np.testing.assert_array_equal, grads, same_grads)
    other[:, 4] = -1 - (ROWS[:, 4] + 1) % 23
    assert run(student, other)[0][0] != loss


def test_questions_weigh_the_same():
    value, counted = (
        np.array([[1.0, 3.0, 9.0], [5.0, 7.0, 7.0]], np.float32),
        np.array([[1, 1, 0], [1, 0, 0]], bool),
    )
    assert finetune.row_mean(jnp.asarray(value), jnp.asarray(counted)) == (2 + 5) / 2


def test_shares_fall_to_nothing():
    mix = FinetuneSpec(gradual="mix", gradual_steps=10)
    at = lambda spec, n: shares(spec, jnp.int32(n), 4).tolist()
    assert at(mix, 0) == [1.0] * 4 and at(mix, 5) == [0.5] * 4 and at(mix, 10) == at(mix, 99) == [0.0] * 4
    layers = FinetuneSpec(gradual="layers", gradual_steps=8)
    assert [at(layers, n) for n in (0, 1, 2, 5, 6)] == [
        [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0] * 4,
    ]  # fmt: skip
    assert at(FinetuneSpec(), 0) == [0.0] * 4


def test_layers_give_way_one_after_the_other(teacher, student):
    """Before half the steps: the trees of the first layer and the dense layer of the second."""
    spec = FinetuneSpec(gradual="layers", gradual_steps=10)
    run = loss_of(TREES, spec, given_by(TREES, DENSE, teacher, spec))
    half = model_spec(TREES.ffns[0], DENSE.ffns[0])
    trees, dense = (split_layers(*given) for given in ((TREES, student), (DENSE, teacher)))
    layers = [trees[0], {"params": {**trees[1]["params"], "ffn": dense[1]["params"]["ffn"]}}]
    _, variables = stack_layers(TREES, student, half.ffns, layers)
    want = plain_loss(half)(variables["params"], variables["routing"], ROWS)[0]
    np.testing.assert_allclose(run(student, ROWS, 4)[1], want, rtol=1e-5)
    alone = plain_loss(TREES)(student["params"], student["routing"], ROWS)[0]
    np.testing.assert_allclose(run(student, ROWS, 5)[1], alone, rtol=1e-6)
    assert abs(want - alone) > 1e-3


def test_dense_fades_into_trees(teacher):
    """With m = 1 everywhere the student computes what its teacher does, with m = 0 what it does alone."""
    student = random_variables(TREES, seed=2)
    for name in ("ln_1", "ln_2", "attn"):
        student["params"]["run_0"][name] = teacher["params"]["run_0"][name]
    student["params"] |= {name: teacher["params"][name] for name in ("embed", "ln_f")}
    spec = FinetuneSpec(gradual="mix", gradual_steps=10)
    run = loss_of(TREES, spec, given_by(TREES, DENSE, teacher, spec))
    nll_of = lambda model, v: plain_loss(model)(v["params"], v.get("routing", {}), ROWS)[0]
    np.testing.assert_allclose(run(student, ROWS, 0)[1], nll_of(DENSE, teacher), rtol=1e-5)
    np.testing.assert_allclose(run(student, ROWS, 10)[1], nll_of(TREES, student), rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_the_feed_forward_layers_change(teacher, student, accumulation):
    """Everything else keeps every bit, weight decay or not; layers and thresholds as training has them."""
    spec = FinetuneSpec(weights="ffn", kl=1.0, ffn=1.0)
    optim = OptimSpec(steps=3, lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(optim)
    # minus zero is a number of its own, to the bit
    params = jax.tree.map(np.array, student["params"])
    for array in jax.tree.leaves(params):
        array.flat[0] = -0.0
    state = TrainState(jnp.int32(0), params, student["routing"], jax.jit(optimizer.init)(params))
    run = jax.jit(
        functools.partial(
            finetune_step, model=TREES, teacher=DENSE, spec=spec, optimizer=optimizer,
            schedule=learning_rate(optim), accumulation=accumulation,
        )
    )  # fmt: skip
    new, _, metrics = run(state, step.empty_usage(TREES), ROWS, given_by(TREES, DENSE, teacher, spec))
    assert new.step == 1 and np.isfinite(metrics["loss"])
    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, new.params, params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(change), rtol=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new.params):
        name = finetune.path_name(path)
        old = functools.reduce(lambda tree, key: tree[key.key], path, params)
        same = np.array_equal(np.asarray(leaf).view(np.uint32), np.asarray(old).view(np.uint32))
        assert same == ("/ffn/" not in name), name
    moments = optax.tree.get(new.opt_state, "mu")
    assert not moments["embed"]["tokens"].any() and moments["run_0"]["ffn"]["w_in"].any()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"task": "chat"}, "finetune.task: 'chat' is not known; use one of: lm, qa"),
        ({"weights": "some"}, "finetune.weights"),
        ({"gradual": "slow"}, "finetune.gradual: 'slow' is not known; use one of: none, mix, layers"),
        ({"gradual": "mix"}, "finetune.gradual_steps: 0 is not allowed"),
        ({"kl": -1.0}, "finetune.kl: -1.0 is not allowed"),
        ({"ce": 0.0}, "there is no loss"),
    ],
)
def test_what_is_not_allowed(fields, said):
    with pytest.raises(InputError, match=said):
        FinetuneSpec(**fields)


def test_who_cannot_teach():
    with pytest.raises(InputError, match="its vocab_size is 29, the student's 23"):
        check_teacher(TREES, model_spec(DenseSpec(24), vocab_size=29), FinetuneSpec(kl=1.0))
    with pytest.raises(InputError, match="its n_layers is 1, the student's 2"):
        check_teacher(TREES, model_spec(DenseSpec(24)), FinetuneSpec(ffn=1.0))
    with pytest.raises(InputError, match="layer 1 is not a dense one with the student's activation"):
        check_teacher(TREES, model_spec(DenseSpec(9), DenseSpec(9, "relu")), FinetuneSpec(ffn=1.0))
