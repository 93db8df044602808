"""The decoder: runs of layers, what is recomputed, causality, dtypes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tests.models import kinds
from tests.models.kinds import KINDS, forward, random_variables
from tree_ffn.errors import InputError
from tree_ffn.models import Transformer, spec_from_dict, spec_to_dict, unrolled, update_model_routing
from tree_ffn.models.ffn import total_units
from tree_ffn.models.spec import REMAT
from tree_ffn.training.step import count_usage, empty_usage

DENSE, TREE, MOE = KINDS["dense"], KINDS["straight_through"], KINDS["leaf_softmax"]
# What these tests are about does not depend on how trees are computed; masked compiles fastest.
model_spec = functools.partial(kinds.model_spec, implementation="masked")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 16)), jnp.int32)


def loss_and_grads(spec, variables):
    def loss(params):
        logits, _ = Transformer(spec).apply({**variables, "params": params}, TOKENS)
        return jnp.mean(jnp.square(logits)) + jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def test_equal_neighbours_make_one_run():
    spec = model_spec(DENSE, TREE, TREE, DENSE)
    assert [length for _, length in spec.runs] == [1, 2, 1]
    variables = random_variables(spec)
    logits, infos = forward(spec)(variables, TOKENS)
    assert logits.shape == (2, 16, 23) and logits.dtype == jnp.float32
    assert [info.leaf_TP.shape for info in infos] == [(1, 32, 0), (2, 32, 2), (1, 32, 0)]
    w_in = variables["params"]["run_1"]["ffn"]["w_in"]
    assert w_in.shape == (2, 2, 14, 16)


@pytest.mark.slow
def test_scan_equals_layers_one_by_one():
    spec = model_spec(DENSE, TREE, TREE)
    variables = random_variables(spec)
    alone, variables_alone = unrolled(spec, variables)
    assert [length for _, length in alone.runs] == [1, 1, 1]
    loss, grads = loss_and_grads(spec, variables)
    loss_alone, grads_alone = loss_and_grads(alone, variables_alone)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-6)
    _, expected = unrolled(spec, {"params": grads})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), expected["params"], grads_alone
    )


@pytest.mark.parametrize(
    "ffn",
    [TREE, *(pytest.param(ffn, marks=pytest.mark.slow) for ffn in (DENSE, MOE))],
    ids=["tree", "dense", "mixture"],
)
def test_what_is_computed_again_changes_nothing_else(ffn):
    specs = [model_spec(ffn, ffn, remat=name) for name in REMAT]
    variables = random_variables(specs[0])
    loss, grads = loss_and_grads(specs[0], variables)
    for spec in specs[1:]:
        loss_remat, grads_remat = loss_and_grads(spec, variables)
        np.testing.assert_allclose(loss, loss_remat, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), grads, grads_remat)

    def products(spec):
        loss = lambda v: jnp.sum(Transformer(spec).apply(v, TOKENS)[0])
        return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("dot_general[")

    none, dots, full = map(products, specs)
    assert dots == none + 2  # attention's own, of queries and keys and of their weights and values
    assert full >= dots + 3  # and those with the weights of queries, of heads, of units


@pytest.mark.parametrize("kind", ["dense", "leaf"])
def test_without_remat_a_tpu_computes_no_product_and_no_attention_twice(kind):
    """Of a unit it saves the product alone, once: activations and norms are computed again."""
    spec = dataclasses.replace(model_spec(KINDS[kind], KINDS[kind]), max_seq_len=128)
    variables, tokens = random_variables(spec), jnp.zeros((1, 128), jnp.int32)
    loss = lambda params: jnp.sum(Transformer(spec).apply({**variables, "params": params}, tokens)[0])
    program = lambda: str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
    chip = AbstractDevice("TPU v5 lite", platform="tpu", num_cores=1)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1), ("data", "model"), abstract_device=chip)):
        there = program()
        saved = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], variables["params"])
    assert there.count("pallas_call[") == 3  # forward, gradients of queries, gradients of keys and values
    products = lambda program: program.count("dot_general[")
    assert products(there) - 9 == products(program()) - 6  # without the kernels' own, and attention's here
    size = 2 * 128 * total_units(spec.ffns[0])
    by_token = lambda shape: shape[:2] == (2, 128) or (len(shape) == 4 and shape[-1] == 128)  # or along lanes
    of_units = [leaf for leaf in jax.tree.leaves(saved) if by_token(leaf.shape) and leaf.size == size]
    assert [leaf.dtype for leaf in of_units] == [jnp.float32]


LIKE_OTHERS = ("narrow", "random_tree", "leaf_softmax", "leaf_hash", "pruned_leaf", "pruned_random_tree")
CAUSAL = [
    pytest.param(kind, "masked", marks=pytest.mark.slow if kind in LIKE_OTHERS else ()) for kind in KINDS
]
CAUSAL += [(kind, "grouped") for kind in ("hard", "leaf")]
CAUSAL += [pytest.param(kind, "gather", marks=pytest.mark.slow) for kind in ("hard", "leaf")]


@pytest.mark.parametrize("kind, implementation", CAUSAL)
def test_causality_by_gradient_pattern(kind, implementation):
    """Scores at position c depend on the embeddings at positions up to c and on no later one.

    Grouped sorts the tokens of all positions together, and must not mix them.
    """
    spec = kinds.model_spec(KINDS[kind], implementation=implementation)
    variables = random_variables(spec)

    def scores_at(positions, c):
        params = {**variables["params"], "embed": {**variables["params"]["embed"], "positions": positions}}
        logits, _ = Transformer(spec).apply({**variables, "params": params}, TOKENS[:1])
        return jnp.sum(jnp.square(logits[0, c]))

    grad = jax.jit(jax.grad(scores_at))
    for c in (0, 7, 15):
        rows = np.abs(np.asarray(grad(variables["params"]["embed"]["positions"], c))).max(axis=1)
        assert (rows[: c + 1] > 0).all() and (rows[c + 1 :] == 0).all()


def test_products_of_a_bfloat16_model_take_bfloat16_and_scores_are_float32():
    spec = model_spec(DENSE, TREE, dtype="bfloat16")
    variables = random_variables(spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    text = jax.jit(Transformer(spec).apply).lower(variables, TOKENS).as_text()
    products = re.findall(r"dot_general.* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text)
    assert len(products) == text.count("stablehlo.dot_general") > 8 and set(products) == {("bf16", "bf16")}
    for states, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        found, _ = jax.eval_shape(
            functools.partial(Transformer(spec).apply, states=states), variables, TOKENS
        )
        assert found.dtype == dtype


def test_what_stands_around_the_layers_is_rounded_once():
    """Layers that add 0: the embeddings' sum and the last norm are rounded once each, and scores are not."""
    spec, tokens = model_spec(DENSE, dtype="bfloat16"), TOKENS[:, :9]
    variables = random_variables(spec)
    silent = lambda path, leaf: 0 * leaf if path[-1].key in ("w_out", "b_out") else leaf
    variables |= {"params": jax.tree_util.tree_map_with_path(silent, variables["params"])}
    rounded = lambda a: np.asarray(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16), np.float64)
    embed, norm = (
        {name: np.asarray(a, np.float64) for name, a in variables["params"][part].items()}
        for part in ("embed", "ln_f")
    )
    states, _ = jax.jit(functools.partial(Transformer(spec).apply, states=True))(variables, tokens)
    x = rounded(embed["tokens"][tokens] + embed["positions"][None, :9])
    np.testing.assert_array_equal(np.asarray(states, np.float64), x)
    x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + spec.norm_eps)
    y, head = rounded(y * norm["scale"] + norm["bias"]), rounded(embed["tokens"])
    # What is within float32's error of the middle of two numbers may be rounded to the other one.
    slack = 2.0**-13 * (np.abs(y) @ np.abs(head).T)
    assert (np.abs(forward(spec)(variables, tokens)[0] - y @ head.T) <= slack).all()


def test_rows_beyond_the_vocabulary_are_never_scored():
    spec = model_spec(DENSE, vocab_multiple=16)
    variables = random_variables(spec)
    assert variables["params"]["embed"]["tokens"].shape == (32, 16)
    _, grads = loss_and_grads(spec, variables)
    assert forward(spec)(variables, TOKENS)[0].shape[-1] == 23
    assert not np.asarray(grads["embed"]["tokens"][23:]).any()


def test_layers_of_a_run_start_different():
    spec = model_spec(DENSE, DENSE)
    w_in = jax.jit(Transformer(spec).init)(jax.random.key(0), TOKENS)["params"]["run_0"]["ffn"]["w_in"]
    assert not np.array_equal(w_in[0], w_in[1])


def test_initial_scales():
    spec = model_spec(DENSE, width=128, vocab_size=400)
    params = jax.jit(Transformer(spec).init)(jax.random.key(0), TOKENS)["params"]
    run = params["run_0"]
    expected = [
        (params["embed"]["tokens"], 0.05),
        (run["attn"]["w_qkv"], 1 / 128**0.5),
        (run["attn"]["w_out"], 0.1 / 128**0.5),
        (run["ffn"]["w_in"], 0.7 / 128**0.5),
        (run["ffn"]["w_out"], 0.05 / 24**0.5),
    ]
    for leaf, std in expected:
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.05)


def test_routing_of_every_run_is_updated():
    tree = dataclasses.replace(TREE, balance_rate=1e-3)
    spec = model_spec(DENSE, tree, tree, MOE)
    variables = random_variables(spec)
    _, infos = forward(spec)(variables, TOKENS)
    counts = jax.jit(count_usage)(empty_usage(spec), infos)
    new = jax.jit(update_model_routing, static_argnums=0)(spec, variables["routing"], counts)
    assert jax.tree.structure(new) == jax.tree.structure(variables["routing"])
    assert np.asarray(new["run_1"]["ffn"]["threshold"]).any()
    assert np.asarray(new["run_2"]["ffn"]["selection_bias"]).any()


def test_a_spec_survives_json():
    spec = model_spec(*KINDS.values(), remat="dots")
    assert spec_from_dict(spec_to_dict(spec)) == spec


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"n_heads": 3}, "width: 16 is not allowed; it must be a multiple of n_heads = 3"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"remat": "some"}, "remat: 'some' is not known; use one of: none, dots, full"),
        ({"remat": True}, "remat: True is not known; use one of: none, dots, full"),
        ({"dtype": "float16"}, "dtype: 'float16' is not known; use one of: float32, bfloat16"),
        ({"implementation": "fast"}, "implementation: 'fast' is not known; use one of: masked,"),
        ({"norm_eps": 0.0}, "norm_eps: 0.0"),
    ],
)
def test_bad_models_are_refused(fields, words):
    with pytest.raises(InputError, match=f"^{words}"):
        model_spec(DENSE, **fields)
