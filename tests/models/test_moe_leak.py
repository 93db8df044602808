"""Experts that are not chosen leak in training: the layer against a float64 oracle, and its two ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.tree.test_executions import assert_near
from tree_ffn.models import FFN, DenseSpec, MoESpec, total_units
from tree_ffn.models.moe import moe_ffn

E, T = 6, 24
IDS = np.arange(T, dtype=np.int32)
SPECS = [
    MoESpec(5, 3, activation="tanh", balance="none"),
    MoESpec(5, 3, top_k=2, activation="silu"),
    MoESpec(5, 3, top_k=2, renormalise=True),
    MoESpec(5, 3, top_k=2, renormalise=True, gate_norm=2),
    MoESpec(6, 3, top_k=2, expert_groups=2),
    MoESpec(6, 3, top_k=4, expert_groups=2, renormalise=True),
    MoESpec(6, 3, top_k=2, expert_groups=2, renormalise=True, gate_norm=2),
    MoESpec(5, 3, activation="tanh", balance="none", router="hash"),
]


def name_of(spec):
    groups = f"-groups{spec.expert_groups}" if spec.expert_groups > 1 else ""
    return f"{spec.router}-{spec.top_k}{groups}" + f"-norm{spec.gate_norm}" * spec.renormalise


def case(rng, spec):
    """Weights of every name, biases not 0, inputs and an output's gradient, in float64."""
    units = (spec.n_experts, spec.expert_width)
    params = {
        "w_in": rng.normal(size=(*units, E)) / E**0.5, "b_in": rng.normal(size=units) / 5,
        "w_out": rng.normal(size=(*units, E)), "b_out": rng.normal(size=E),
    }  # fmt: skip
    if spec.router == "softmax":
        params |= {"w_router": rng.normal(size=(spec.n_experts, E))}
        params |= {"selection_bias": rng.normal(size=spec.n_experts) / 9}
    return params, rng.normal(size=(T, E)), rng.normal(size=(T, E))


def chosen_gates(params, x, token, spec):
    """For one token: each group's softmax, which experts are chosen, and their gates without a leak."""
    if spec.router == "hash":
        chosen = np.arange(spec.n_experts) == oracle.hashed(token, 7, spec.n_experts)
        return None, chosen, chosen * 1.0
    groups = np.split(np.arange(spec.n_experts), spec.expert_groups)
    scores = np.exp(params["w_router"] @ x)
    p = np.concatenate([scores[group] / scores[group].sum() for group in groups])
    preferred = p + params["selection_bias"]
    best = [group[np.argsort(-preferred[group])][: spec.top_k // spec.expert_groups] for group in groups]
    chosen = np.isin(np.arange(spec.n_experts), best)
    return p, chosen, chosen * p / (np.linalg.norm(p[chosen], spec.gate_norm) if spec.renormalise else 1.0)


def layer_in_float64(params, x_TE, dy_TE, leak, spec):
    """y, chosen experts and all gradients of sum(dy * y), every derivative by hand.

    y = b_out + sum_e g_e act(w_in_e x + b_in_e) w_out_e,   g_e = leak + (1 - leak) q_e [e chosen]
    """
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    y_TE, dx_TE, chosen_T = np.zeros_like(x_TE), np.zeros_like(x_TE), []
    for t, (x, dy) in enumerate(zip(x_TE, dy_TE)):
        p, chosen, q = chosen_gates(params, x, IDS[t], spec)
        chosen_T.append(set(np.flatnonzero(chosen)))
        y_TE[t] += params["b_out"]
        grads["b_out"] += dy
        dq = np.zeros(spec.n_experts)
        for e in range(spec.n_experts):
            gate = leak + (1 - leak) * q[e]
            h, slope = oracle.ACTIVATIONS[spec.activation](params["w_in"][e] @ x + params["b_in"][e], 0.01)
            y_TE[t] += gate * h @ params["w_out"][e]
            dq[e] = (1 - leak) * chosen[e] * (h @ params["w_out"][e] @ dy)
            dz = gate * slope * (params["w_out"][e] @ dy)
            grads["w_out"][e] += gate * np.outer(h, dy)
            grads["w_in"][e] += np.outer(dz, x)
            grads["b_in"][e] += dz
            dx_TE[t] += dz @ params["w_in"][e]
        if p is not None:
            dp = dq
            if spec.renormalise:  # q = p / n, and dn/dp is 1 or q
                slope_of_norm = 1.0 if spec.gate_norm == 1 else q
                dp = chosen * (dq - dq @ q * slope_of_norm) / np.linalg.norm(p[chosen], spec.gate_norm)
            of_group = np.repeat(
                (dp * p).reshape(spec.expert_groups, -1).sum(axis=1), len(p) // spec.expert_groups
            )
            d_logits = p * (dp - of_group)
            grads["w_router"] += np.outer(d_logits, x)
            dx_TE[t] += d_logits @ params["w_router"]
    return y_TE, chosen_T, grads, dx_TE


@functools.partial(jax.jit, static_argnames="spec")
def run(params, x, dy, leak, spec):
    """Output, chosen experts and gradients; a leak of None is the layer itself."""
    weights = {name: value for name, value in params.items() if name != "salt"}
    fixed = {name: value for name, value in params.items() if name == "salt"}
    layer = lambda weights, x: moe_ffn(weights | fixed, x, spec, jnp.asarray(IDS), leak)
    y, vjp, info = jax.vjp(layer, weights, x, has_aux=True)
    return y, info.leaf_TP, *vjp(dy)


def run_case(params, x, dy, leak, spec):
    single = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    if spec.router == "hash":
        single["salt"] = jnp.int32(7)
    return run(single, jnp.float32(x), jnp.float32(dy), leak, spec)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("leak", [0.0, 0.25, 1.0])
def test_leaking_experts_are_the_oracles(rng, spec, leak):
    params, x, dy = case(rng, spec)
    want_y, want_chosen, want_grads, want_dx = layer_in_float64(params, x, dy, leak, spec)
    y, chosen, grads, dx = run_case(params, x, dy, jnp.float32(leak), spec)
    assert [set(row) for row in np.asarray(chosen).tolist()] == want_chosen
    assert_near(y, want_y, "y")
    assert_near(dx, want_dx, "dx")
    assert grads.keys() == want_grads.keys()
    for name, value in grads.items():
        assert_near(value, want_grads[name], f"d{name}")


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_a_leak_of_nothing_is_the_mixture(rng, spec):
    params, x, dy = case(rng, spec)
    plain, leaking = (run_case(params, x, dy, leak, spec) for leak in (None, jnp.float32(0)))
    for got, want in zip(jax.tree.leaves(leaking), jax.tree.leaves(plain)):
        assert_near(got, want, "at leak 0", 1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_experts_that_leak_wholly_are_a_dense_layer(rng, spec):
    params, x, dy = case(rng, spec)
    y, _, grads, _ = run_case(params, x, dy, jnp.float32(1), spec)
    names = ("w_in", "b_in", "w_out")
    dense = {name: jnp.float32(params[name].reshape(-1, *params[name].shape[2:])) for name in names}
    dense["b_out"] = jnp.float32(params["b_out"])
    want, _ = FFN(DenseSpec(total_units(spec), spec.activation)).apply({"params": dense}, jnp.float32(x))
    assert_near(y, want, "y")
    assert not np.any(grads.get("w_router", 0))  # no choice matters yet


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_experts_that_no_token_chose_learn_from_a_leak_alone(rng, spec):
    params, x, dy = case(rng, spec)
    one_token = np.arange(T)[:, None] == 3
    for leak, learning in ((None, spec.top_k), (jnp.float32(0.5), spec.n_experts)):
        _, chosen, grads, _ = run_case(params, x, one_token * dy, leak, spec)
        for name in ("w_in", "b_in", "w_out"):
            touched = np.abs(np.asarray(grads[name])).reshape(spec.n_experts, -1).sum(axis=1) > 0
            assert touched.sum() == learning and touched[np.asarray(chosen[3])].all()


def test_the_linen_layer_takes_a_leak_and_keeps_low_precision(rng):
    spec = SPECS[1]
    params, x, dy = case(rng, spec)
    single = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    variables = {"params": single, "routing": {"selection_bias": single.pop("selection_bias")}}
    leak = {"leak": {"leak": jnp.float32(0.5)}}
    y, _ = FFN(spec).apply(variables | leak, jnp.float32(x))
    assert_near(y, layer_in_float64(params, x, dy, 0.5, spec)[0], "y")
    low, _ = jax.eval_shape(FFN(spec).apply, variables | leak, jnp.bfloat16(x))
    assert low.dtype == jnp.bfloat16
