"""What chosen experts add up to and its gradients, for many tokens on an NVIDIA GPU like Hopper.

A pair is a token t and a chosen expert e with its gate g. Pairs p are sorted by expert, then by token:

    z[p] = <x[t], w_in[e]> + b_in[e],   c[p] = g act(z[p]),   y[t] = sum over the pairs of t of c[p] w_out[e]

The CUDA part multiplies; what is done to every number of z by itself is XLA's. Operands are bfloat16, sums
float32. An expert's W units are filled up to U = 8, 16, 32, 64 or 128.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.kernels import cuda

# As in experts.cu.
MOST_ROWS, ITEM, INNER, MOST_PAIRS = 192, 128, 64, 2**26
MOST_BYTES = 2**28  # of what pairs add to their tokens, in memory at a time

LIKE_HOPPER = ("9.", "10.")  # 227 KiB of shared memory a block


class Plan(NamedTuple):
    """Where pairs stand, and what the blocks of a kernel do.

    Attributes:
      pair_N: int32, t K + k of every pair.
      token_N: int32, its t.
      slot_TK: int32, where each pair stands.
      starts: int32 [X S + 1], the first pair of every expert and every part of the tokens, of S.
      count: int32, the number of items.
      items: int32 [M, 4]: expert, first pair and number of pairs, at most ITEM.
    """

    pair_N: jax.Array
    token_N: jax.Array
    slot_TK: jax.Array
    starts: jax.Array
    count: jax.Array
    items: jax.Array


class Saved(NamedTuple):
    """What the backward pass reads of the forward pass: the plan, and z float32 [N, U]."""

    plan: Plan
    z_NU: jax.Array


def fit(x_TE, ids_TK, units: tuple[int, ...]) -> bool:
    """Whether the kernels compute sums of such tokens: bfloat16, of a width that they load in whole pieces.

    Args:
      x_TE: tokens.
      ids_TK: the chosen experts.
      units: X, W, E.
    """
    n_pairs = ids_TK.size
    if not isinstance(n_pairs, int) or not 0 < n_pairs <= MOST_PAIRS or x_TE.dtype != jnp.bfloat16:
        return False
    return units[1] <= 128 and units[2] % INNER == 0


def is_loaded() -> bool:
    """Whether they are built for this machine's GPU, and it has the shared memory that they ask for."""
    return cuda.device_capability().startswith(LIKE_HOPPER) and cuda.is_loaded("experts")


def parts(n_tokens: int) -> tuple[int, int]:
    """Parts of the tokens that are counted by themselves, and the tokens of each.

    Args:
      n_tokens: T.
    """
    n = 4 * -(-n_tokens // (4 * MOST_ROWS))
    return n, -(-n_tokens // n)


def columns(n_pairs: int, width: int) -> int:
    """Columns of what pairs add to their tokens that are in memory together.

    Args:
      n_pairs: T K.
      width: E.
    """
    turns = -(-2 * n_pairs * width // MOST_BYTES)
    return INNER * -(-width // (INNER * turns))


def filled(width: int) -> int:
    """U of W.

    Args:
      width: W.
    """
    return next(units for units in (8, 16, 32, 64, 128) if width <= units)


def saved_shapes(ids_TK, units: tuple[int, ...]) -> Saved:
    """Shapes and dtypes of what `forward` saves.

    Args:
      ids_TK: the chosen experts.
      units: X, W, E.
    """
    (n_tokens, top_k), n_experts, n = ids_TK.shape, units[0], ids_TK.size
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    plan = Plan(
        pair_N=int32(n),
        token_N=int32(n),
        slot_TK=int32(n_tokens, top_k),
        starts=int32(n_experts * parts(n_tokens)[0] + 1),
        count=int32(1),
        items=int32(n // ITEM + n_experts, 4),
    )
    return Saved(plan, jax.ShapeDtypeStruct((n, filled(units[1])), jnp.float32))


def _plan(ids_TK: jax.Array, units: tuple[int, ...]) -> Plan:
    numbers = {"experts": units[0], "sub": parts(ids_TK.shape[0])[1]}
    return Plan(*_call("plan", saved_shapes(ids_TK, units).plan, ids_TK, **numbers))


def _units(rows_TE, w_XWE, b_XW, plan: Plan) -> jax.Array:
    """<rows[t], w[e]> + b[e] of every pair: float32 [N, U]."""
    shape = jax.ShapeDtypeStruct((plan.token_N.size, filled(w_XWE.shape[1])), jnp.float32)
    return _call("units", shape, rows_TE, w_XWE, b_XW, plan.token_N, plan.count, plan.items)


def _sums(c_NU, w_XWE, plan: Plan) -> jax.Array:
    """Sum over the pairs of a token of c[p] w[e]: bfloat16 [T, E]."""
    n_tokens, n_pairs, width = plan.slot_TK.shape[0], plan.slot_TK.size, w_XWE.shape[2]
    shapes = (n_tokens, width), (n_pairs, columns(n_pairs, width))
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return _call("sums", shapes, c_NU, w_XWE, plan.slot_TK, plan.count, plan.items)[0]


def _grads(c_NU, rows_TE, like_XWE, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Sums over the pairs of an expert of c[p] rows[t], in the dtype of `like`, and of c[p], float32."""
    shapes = (jax.typeof(like_XWE), jax.ShapeDtypeStruct(like_XWE.shape[:2], jnp.float32))
    shapes = tuple(jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in shapes)
    dw_XWE, db_XW = _call("grads", shapes, c_NU, rows_TE, plan.token_N, plan.starts)
    return dw_XWE, db_XW


def _call(name: str, shapes, *arrays, **numbers):
    return jax.ffi.ffi_call(f"tree_ffn_{name}", shapes)(
        *arrays, **{key: np.int64(n) for key, n in numbers.items()}
    )


def forward(x_TE, w_in, b_in, w_out, ids_TK, gates_TK, act: Callable) -> tuple[jax.Array, Saved]:
    """y, and what `backward` reads.

    Args:
      x_TE: bfloat16.
      w_in: [X, W, E] of any floating dtype, as b_in [X, W] and w_out [X, W, E].
      b_in: see w_in.
      w_out: see w_in.
      ids_TK: int32, the chosen experts, those of a token distinct.
      gates_TK: float32.
      act: the activation.
    """
    plan = _plan(ids_TK, w_in.shape)
    z_NU = _units(x_TE, w_in.astype(x_TE.dtype), b_in.astype(jnp.float32), plan)
    gate_N1 = gates_TK.reshape(-1)[plan.pair_N][:, None]
    c_NU = (act(z_NU) * gate_N1).astype(x_TE.dtype)
    return _sums(c_NU, w_out.astype(x_TE.dtype), plan), Saved(plan, z_NU)


def backward(dy_TE, x_TE, w_in, b_in, w_out, gates_TK, saved: Saved, act: Callable) -> tuple:
    """Gradients of x, w_in, b_in, w_out and gates, in their dtypes.

    Args:
      dy_TE: of y, bfloat16.
      x_TE: as of `forward`, and so are the next.
      w_in: see there.
      b_in: see there.
      w_out: see there.
      gates_TK: see there.
      saved: by `forward`.
      act: the activation.
    """
    (plan, z_NU), dtype = saved, x_TE.dtype
    none_XW = jnp.zeros(b_in.shape, jnp.float32)
    dc_NU = _units(dy_TE, w_out.astype(dtype), none_XW, plan)
    gate_N1 = gates_TK.reshape(-1)[plan.pair_N][:, None]
    h_NU, to_dz = jax.vjp(act, z_NU)
    (dz_NU,) = to_dz(dc_NU * gate_N1)
    d_gate_N = (h_NU * dc_NU).sum(axis=1)
    c_NU, dz_NU = (h_NU * gate_N1).astype(dtype), dz_NU.astype(dtype)
    dw_out, _ = _grads(c_NU, dy_TE, w_out, plan)
    dw_in, db_in = _grads(dz_NU, x_TE, w_in, plan)
    dx_TE = _sums(dz_NU, w_in.astype(dtype), plan)
    return dx_TE, dw_in, db_in.astype(b_in.dtype), dw_out, d_gate_N[plan.slot_TK]


def probe() -> None:
    """Raises unless the kernels add up a small layer, with its gradients, as XLA does."""
    if not cuda.device_capability().startswith(LIKE_HOPPER):
        return
    if not is_loaded():
        raise ArithmeticError("it is not loaded")
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    x_TE, dy_TE, ids_TK = draw(0, 100, 64), draw(1, 100, 64), jnp.arange(200).reshape(100, 2) % 7
    units, gates_TK = (draw(2, 7, 5, 64), draw(3, 7, 5), draw(4, 7, 5, 64)), jnp.abs(draw(5, 100, 2))

    def plain(x_TE, w_in, b_in, w_out, gates_TK):
        z_TKW = jnp.einsum("te,tkwe->tkw", x_TE, w_in[ids_TK]) + b_in[ids_TK]
        return jnp.einsum("tkw,tk,tkwe->te", jax.nn.silu(z_TKW), gates_TK, w_out[ids_TK])

    float32 = lambda arrays: jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
    want, back = jax.vjp(plain, *float32((x_TE, *units, gates_TK)))
    y_TE, saved = forward(x_TE, *units, ids_TK, float32(gates_TK), jax.nn.silu)
    grads = backward(dy_TE, x_TE, *units, float32(gates_TK), saved, jax.nn.silu)
    for got, right in zip((y_TE, *grads), (want, *back(float32(dy_TE)))):
        if not jnp.linalg.norm(got.astype(jnp.float32) - right) < 2e-2 * jnp.linalg.norm(right):
            raise ArithmeticError("its sums are not those of XLA")
