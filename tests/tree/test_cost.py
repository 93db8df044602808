"""Gather and grouped do their own work: a fraction of masked's FLOPs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.tree import cases
from tree_ffn.tree import LeafSpec, combine
from tree_ffn.tree.grouped import BLOCK

E = 64
SPECS = {
    "leaves": (LeafSpec(n_experts=64, expert_width=6, top_k=2, activation="relu"), 2),
    "paths": (cases.make_spec(P=1, D=7, W=12, activation="relu"), 1),
}  # with K of each; A / F = 3.1 % of both


def forward(spec, params, x, ids, gates, implementation):
    return combine(params, x, ids, gates, spec, implementation)


def backward(spec, params, x, ids, gates, implementation):
    total = lambda params, x, gates: forward(spec, params, x, ids, gates, implementation)
    s, back = jax.vjp(total, params, x, gates)
    return back(s)


@functools.cache
def flops(function, name, n_tokens, implementation):
    """XLA's own count. No implementation has a loop, whose body it would count once."""
    spec, K = SPECS[name]
    F, shape = spec.total_units, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"w_in": shape((F, E)), "b_in": shape((F,)), "w_out": shape((F, E))}
    ids = jax.ShapeDtypeStruct((n_tokens, K), jnp.int32)
    run = jax.jit(functools.partial(function, spec, implementation=implementation))
    program = run.lower(params, shape((n_tokens, E)), ids, shape((n_tokens, K)))
    assert "stablehlo.while" not in program.as_text()
    return program.compile({"xla_backend_optimization_level": 0}).cost_analysis()["flops"]


def needed(name, units, n_tokens):
    """Multiply-adds x 2 with rows of w_in and of w_out."""
    return 2 * 2 * n_tokens * units * E


@pytest.mark.parametrize("name", SPECS)
def test_masked_multiplies_all_rows(name):
    """The count is right: the products, and little for gates and activations."""
    all_rows = needed(name, SPECS[name][0].total_units, 64)
    assert all_rows <= flops(forward, name, 64, "masked") < 1.2 * all_rows


@pytest.mark.parametrize("function", [forward, backward])
@pytest.mark.parametrize("name", SPECS)
def test_gather_of_one_token(name, function):
    assert flops(function, name, 1, "gather") < 0.25 * flops(function, name, 1, "masked")


@pytest.mark.parametrize("function", [forward, backward])
@pytest.mark.parametrize("name", SPECS)
def test_grouped_of_many_tokens(name, function):
    n_tokens = 64 * BLOCK
    assert flops(function, name, n_tokens, "grouped") < 0.25 * flops(function, name, n_tokens, "masked")
