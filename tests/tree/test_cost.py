"""Gather and grouped do their own work: a fraction of the masked execution's FLOPs, and no mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree import cases
from tree_ffn.tree import init_params, loop
from tree_ffn.tree.blocks import max_blocks

SPEC = cases.make_spec("hard", P=1, D=7, W=12)  # A/F = 3.1 %
E = 32


def forward(params, x, execution):
    with cases.traced_form(execution):
        return cases.layer(params, x, SPEC, execution)[0]


def backward(params, x, execution):
    with cases.traced_form(execution):
        y, vjp = jax.vjp(lambda *args: cases.layer(*args, SPEC, execution)[0], params, x)
        return vjp(y)


def arguments(T):
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), SPEC, E))
    return params, jax.ShapeDtypeStruct((T, E), jnp.float32)


@functools.cache
def compiled(function, T, execution):
    lowered = jax.jit(functools.partial(function, execution=execution)).lower(*arguments(T))
    return lowered.compile(
        {"xla_backend_optimization_level": 0}
    )  # how LLVM optimizes does not change the count


def xla_flops(function, T, execution):
    """XLA's own count; it counts the body of a loop once."""
    return compiled(function, T, execution).cost_analysis()["flops"]


def product_flops(jaxpr, trips):
    """FLOPs of a jaxpr's matrix products: a scan's `length` times, a while loop's `trips` times."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        times = {"scan": equation.params.get("length", 1), "while": trips}.get(name, 1)
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
        for part in inner:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                total += times * product_flops(part, trips)
    return total


def honest_flops(function, T, execution, trips=None):
    """Every block of a loop counted, and as many blocks as there can ever be."""
    jaxpr = jax.make_jaxpr(functools.partial(function, execution=execution))(*arguments(T))
    leaves = SPEC.shape.n_leaves
    most = max_blocks(T, leaves, loop.block_size(T, leaves))
    return product_flops(jaxpr.jaxpr, most if trips is None else trips)


def test_the_count_of_products_is_right():
    """Masked forward: x meets F rows of w_in and F of w_out."""
    assert honest_flops(forward, 64, "masked") == 2 * 2 * 64 * SPEC.shape.total_units * E


@pytest.mark.parametrize("function", [forward, backward])
def test_gather_of_one_token(function):
    assert xla_flops(function, 1, "gather") < 0.25 * xla_flops(function, 1, "masked")
    assert honest_flops(function, 1, "gather") < 0.25 * honest_flops(function, 1, "masked")


@pytest.mark.parametrize("function", [forward, backward])
def test_grouped_batched_form_of_many_tokens(function):
    """The form for accelerators has no product in a loop: XLA's count is the whole of it."""
    assert honest_flops(function, 4096, cases.BATCHED, trips=0) == honest_flops(function, 4096, cases.BATCHED)
    assert xla_flops(function, 4096, cases.BATCHED) < 0.25 * xla_flops(function, 4096, "masked")
    assert honest_flops(function, 4096, cases.BATCHED) < 0.25 * honest_flops(function, 4096, "masked")


@pytest.mark.parametrize("function", [forward, backward])
def test_grouped_loop_form_of_many_tokens(function):
    """XLA counts one block of the form for CPUs, so all blocks are counted here, the most there can be."""
    assert xla_flops(function, 4096, "grouped") < 0.25 * xla_flops(function, 4096, "masked")
    assert honest_flops(function, 4096, "grouped") < 0.25 * honest_flops(function, 4096, "masked")
