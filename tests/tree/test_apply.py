"""The public function's door: initial weights, what does not fit, and what is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree import cases
from tree_ffn.errors import InputError
from tree_ffn.tree import IMPLEMENTATIONS, init_params, pick_implementation, tree_ffn


def test_initial_weights():
    spec = cases.make_spec(P=4, D=4, W=4, S=64)
    params = init_params(jax.random.key(0), spec, 48, w_in_scale=0.7, w_out_scale=2.0)
    assert set(params) == {"w_in", "b_in", "w_out", "b_out", "threshold", "shared"}
    A = spec.shape.active_units
    for part in (params, params["shared"]):
        assert np.std(part["w_in"]) == pytest.approx(0.7 / 48**0.5, rel=0.05)
        assert np.std(part["w_out"]) == pytest.approx(2.0 / A**0.5, rel=0.05)
        assert not np.any(part["b_in"])
    assert not np.any(params["b_out"]) and not np.any(params["threshold"])
    assert params["threshold"].shape == (4, 31) and params["w_in"].shape == (4, 31 * 4, 48)
    rows = np.concatenate(
        [np.asarray(p[k]).reshape(-1, 48) for p in (params, params["shared"]) for k in ("w_in",)]
    )
    assert len(np.unique(rows[:, 0])) == len(rows)  # no two trees, and no shared unit, start alike


def test_frozen_routers_are_drawn_beside_the_units():
    spec = cases.make_spec(P=2, D=3, router="frozen")
    params = init_params(jax.random.key(0), spec, 8)
    assert params["router"]["w"].shape == (2, 7, 8) and "shared" not in params
    assert np.unique(params["router"]["w"]).size == 2 * 7 * 8


def test_storage_dtype():
    params = init_params(jax.random.key(0), cases.make_spec(S=1), 8, param_dtype=jnp.bfloat16)
    assert params["w_in"].dtype == params["shared"]["w_out"].dtype == jnp.bfloat16
    assert params["threshold"].dtype == jnp.float32


@pytest.mark.parametrize("name", ["w_in", "b_in", "w_out", "b_out", "threshold"])
def test_weights_of_another_shape_are_named(name, rng):
    spec = cases.make_spec(P=2, D=2)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    params[name] = params[name][..., :-1]
    with pytest.raises(InputError, match=f"^{name}: shape .*need"):
        tree_ffn(params, x, spec)


@pytest.mark.parametrize("group, name", [("shared", "w_in"), ("shared", "b_in"), ("router", "w")])
def test_weights_of_an_option_are_named(group, name, rng):
    spec = cases.make_spec(P=2, D=2, S=2, router="frozen")
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    params[group][name] = params[group][name][:-1]
    with pytest.raises(InputError, match=f"^{group}.{name}: shape .*need"):
        tree_ffn(params, x, spec)
    del params[group]
    with pytest.raises(InputError, match=f"^{group}.w.*: is missing"):
        tree_ffn(params, x, spec)


def test_tokens_must_be_a_matrix(rng):
    spec = cases.make_spec()
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match="x: shape .*tokens, width"):
        tree_ffn(params, x[None], spec)


def test_tokens_must_be_floats(rng):
    spec = cases.make_spec()
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match="x: dtype int32 .*float32 or bfloat16"):
        tree_ffn(params, x.astype(jnp.int32), spec)


@pytest.mark.parametrize(
    "ids", [np.zeros(1, np.int32), np.zeros((13, 1), np.int32), np.zeros(13, np.float32)]
)
def test_a_hash_needs_an_id_for_every_token(ids, rng):
    spec = cases.make_spec(D=2, hash_levels=2)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    with pytest.raises(InputError, match=r"token_T: shape .* of the 13 tokens, int32 \[13\]"):
        tree_ffn(params, x, spec, token_T=jnp.asarray(ids))


@pytest.mark.parametrize("execution", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("routing", ["hard", "continuous_product"])
def test_no_token_is_no_output(routing, execution, rng):
    spec = cases.make_spec(routing, P=2, D=2, S=1)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    run = lambda params, x: tree_ffn(params, x, spec, execution)
    (y, info), vjp = jax.vjp(run, params, x[:0], has_aux=False)
    assert y.shape == (0, x.shape[1]) and info.leaf_TP.shape == (0, 2)
    dy = (y, info._replace(leaf_TP=np.zeros((0, 2), jax.dtypes.float0)))
    assert not any(np.any(g) for g in jax.tree.leaves(vjp(dy)) if g.dtype != jax.dtypes.float0)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("P, W", [(1, 32), (32, 1)])
def test_every_choice_is_an_execution(P, W, backend):
    for T in (1, 16, 4096):
        assert pick_implementation(cases.make_spec(P=P, D=4, W=W), T, backend) in IMPLEMENTATIONS


def test_one_token_on_a_cpu_is_gathered():
    assert pick_implementation(cases.make_spec(P=1, D=7, W=12), 1, "cpu") == "gather"


def test_info(rng):
    spec = cases.make_spec(P=2, D=2)
    params, x, _ = cases.on_device(cases.grid_case(rng, spec))
    y, info = jax.jit(lambda params, x: tree_ffn(params, x, spec))(params, x)
    assert y.shape == x.shape and info.leaf_TP.shape == (13, 2) and info.leaf_TP.dtype == jnp.int32
    assert info.aux_loss.shape == () and info.aux_loss == 0.0


def test_vmap_over_layers(rng):
    """Stacked layers, each with its own tokens."""
    spec = cases.make_spec(P=2, D=2, W=2)
    layers = [cases.grid_case(rng, spec) for _ in range(2)]
    params, x, _ = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    for execution in cases.EXECUTIONS:
        run = lambda params, x, e=execution: tree_ffn(params, x, spec, e)[0]
        got = jax.jit(jax.vmap(run), compiler_options={"xla_backend_optimization_level": 0})(params, x)
        for l, (params_l, x_l, _) in enumerate(layers):
            want = oracle.forward(params_l, x_l, spec).y
            np.testing.assert_allclose(got[l], want, atol=2e-5, err_msg=execution)
