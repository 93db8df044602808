"""What chosen experts add up to and its gradients, for many tokens on an NVIDIA GPU like Hopper.

Of a tree's leaves a token chooses neighbours more often than others, so that the G leaves below a node,
siblings, are multiplied together. A pair is a token t and siblings e, of which it chose one at least; those
that it did not choose have gate 0. Pairs p are sorted by e, then by token:

    z[p] = <x[t], w_in[e]> + b_in[e],   c[p] = g[p] act(z[p]),   y[t] = sum over t's pairs of c[p] w_out[e]

The CUDA part multiplies; what is done to every number of z by itself is XLA's. Operands are bfloat16, sums
float32, and what a pair adds is rounded before a token adds it up. The G W units of siblings are filled up to
U = 8, 16, 32, 64 or 128.
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
MOST_SIBLINGS, SIBLINGS_UNITS = 4, 32  # what was fastest: results/speed_layer.jsonl


class Plan(NamedTuple):
    """Where pairs stand, and what the blocks of a kernel do.

    There are N = T K places. Where tokens chose siblings the last are empty.

    Attributes:
      token_N: int32, t of every pair.
      slot_TK: int32, where the pair of a choice stands; ~slot if an earlier choice of the token does, too.
      starts: int32 [X / G S + 1], the first pair of all siblings and every part of the tokens, of S.
      counts: int32, the numbers of items and of jobs.
      items: int32 [M, 4]: siblings, first pair and number of pairs, at most ITEM.
      jobs: int32 [J, 4]: the same for gradients, and which part of its siblings' it is; -1: all.
      ranges: int32 [X / G, 2]: the first of the parts of siblings, and their number.
    """

    token_N: jax.Array
    slot_TK: jax.Array
    starts: jax.Array
    counts: jax.Array
    items: jax.Array
    jobs: jax.Array
    ranges: jax.Array


class Saved(NamedTuple):
    """What the backward pass reads of the forward pass: the plan, and z float32 [N, U]."""

    plan: Plan
    z_NU: jax.Array


def fit(x_TE, top_k: int, units: tuple[int, ...]) -> bool:
    """Whether the kernels compute sums of such tokens: bfloat16, of a width that they load in whole pieces.

    Args:
      x_TE: tokens.
      top_k: K.
      units: X, W, E.
    """
    n_pairs = x_TE.shape[0] * top_k
    if not isinstance(n_pairs, int) or not 0 < n_pairs <= MOST_PAIRS or x_TE.dtype != jnp.bfloat16:
        return False
    return units[1] <= 128 and units[2] % INNER == 0


def job(width: int) -> int:
    """Most pairs of which a block adds up the gradients: fewer where there are fewer columns to divide.

    Args:
      width: E.
    """
    return max(512, 2 ** ((width // 2).bit_length() - 1))


def siblings(spec, most: int = MOST_SIBLINGS, units: int = SIBLINGS_UNITS) -> int:
    """G: how many leaves in a row are multiplied together.

    Args:
      spec: a LeafSpec.
      most: of them.
      units: that they have together, at most.
    """
    most = min(most, 2**spec.depth, units // spec.expert_width)
    return 2 ** (most.bit_length() - 1) if spec.router == "tree" and most else 1


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


def saved_shapes(ids_TK, units: tuple[int, ...], n_siblings: int) -> Saved:
    """Shapes and dtypes of what `forward` saves.

    Args:
      ids_TK: the chosen experts.
      units: X, W, E.
      n_siblings: G.
    """
    n, n_sums, most = ids_TK.size, units[0] // n_siblings, job(units[2])
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    plan = Plan(
        token_N=int32(n),
        slot_TK=int32(*ids_TK.shape),
        starts=int32(n_sums * parts(ids_TK.shape[0])[0] + 1),
        counts=int32(2),
        items=int32(n // ITEM + n_sums, 4),
        jobs=int32(n // most + n_sums, 4),
        ranges=int32(n_sums, 2),
    )
    return Saved(plan, jax.ShapeDtypeStruct((n, filled(n_siblings * units[1])), jnp.float32))


def _plan(ids_TK: jax.Array, units: tuple[int, ...], n_siblings: int) -> Plan:
    numbers = {"siblings": n_siblings, "experts": units[0] // n_siblings}
    numbers |= {"sub": parts(ids_TK.shape[0])[1], "job": job(units[2])}
    return Plan(*_call("plan", saved_shapes(ids_TK, units, n_siblings).plan, ids_TK, **numbers))


def _together(array_XW: jax.Array, n_siblings: int) -> jax.Array:
    """Units of siblings in a row: [X / G, G W, ...]."""
    return array_XW.reshape(array_XW.shape[0] // n_siblings, -1, *array_XW.shape[2:])


def _places(plan: Plan, ids_TK: jax.Array, n_siblings: int) -> tuple[jax.Array, jax.Array]:
    """Of every choice, its place and which of the siblings it is."""
    return jnp.maximum(plan.slot_TK, ~plan.slot_TK), ids_TK % n_siblings


def _gates(gates_TK, plan: Plan, ids_TK, n_siblings: int, units: tuple[int, ...]) -> jax.Array:
    """Of every unit of every pair: [N, U]."""
    n, width, n_units = gates_TK.size, units[1], filled(n_siblings * units[1])
    options = {"mode": "promise_in_bounds", "unique_indices": True}
    gate_NG = jnp.zeros((n, n_siblings), jnp.float32)
    gate_NG = gate_NG.at[_places(plan, ids_TK, n_siblings)].set(gates_TK, **options)
    gate_NU = jnp.broadcast_to(gate_NG[..., None], (n, n_siblings, width)).reshape(n, n_siblings * width)
    return jnp.pad(gate_NU, ((0, 0), (0, n_units - gate_NU.shape[1])))


def _units(rows_TE, w_XWE, b_XW, plan: Plan) -> jax.Array:
    """<rows[t], w[e]> + b[e] of every pair: float32 [N, U]."""
    shape = jax.ShapeDtypeStruct((plan.token_N.size, filled(w_XWE.shape[1])), jnp.float32)
    return _call("units", shape, rows_TE, w_XWE, b_XW, plan.token_N, plan.counts, plan.items)


def _sums(c_NU, w_XWE, plan: Plan) -> jax.Array:
    """Sum over the pairs of a token of c[p] w[e]: bfloat16 [T, E]."""
    n_tokens, n_pairs, width = plan.slot_TK.shape[0], plan.slot_TK.size, w_XWE.shape[2]
    shapes = (n_tokens, width), (n_pairs, columns(n_pairs, width))
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return _call("sums", shapes, c_NU, w_XWE, plan.slot_TK, plan.counts, plan.items)[0]


def _grads(c_NU, rows_TE, like_XWE, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Sums over the pairs of an expert of c[p] rows[t], in the dtype of `like`, and of c[p], float32."""
    shape, n_parts = like_XWE.shape, max(1, 2 * c_NU.shape[0] // job(like_XWE.shape[2]))
    wholes, parts = (shape, like_XWE.dtype), ((n_parts, *shape[1:]), jnp.float32)
    biases = [(one[:2], jnp.float32) for one, _ in (wholes, parts)]
    shapes = tuple(jax.ShapeDtypeStruct(*one) for one in (wholes, biases[0], parts, biases[1]))
    lists = (plan.token_N, plan.counts, plan.jobs, plan.ranges)
    return tuple(_call("grads", shapes, c_NU, rows_TE, *lists)[:2])


def _call(name: str, shapes, *arrays, **numbers):
    return jax.ffi.ffi_call(f"tree_ffn_{name}", shapes)(
        *arrays, **{key: np.int64(n) for key, n in numbers.items()}
    )


def forward(
    x_TE, w_in, b_in, w_out, ids_TK, gates_TK, act: Callable, n_siblings: int
) -> tuple[jax.Array, Saved]:
    """y, and what `backward` reads.

    Args:
      x_TE: bfloat16.
      w_in: [X, W, E] of any floating dtype, as b_in [X, W] and w_out [X, W, E].
      b_in: see w_in.
      w_out: see w_in.
      ids_TK: int32, the chosen experts, those of a token distinct.
      gates_TK: float32.
      act: the activation.
      n_siblings: G.
    """
    plan, together = _plan(ids_TK, w_in.shape, n_siblings), lambda array: _together(array, n_siblings)
    z_NU = _units(x_TE, together(w_in.astype(x_TE.dtype)), together(b_in.astype(jnp.float32)), plan)
    gate_NU = _gates(gates_TK, plan, ids_TK, n_siblings, w_in.shape)
    c_NU = jnp.where(gate_NU == 0, 0.0, act(z_NU) * gate_NU).astype(x_TE.dtype)
    return _sums(c_NU, together(w_out.astype(x_TE.dtype)), plan), Saved(plan, z_NU)


def backward(
    dy_TE, x_TE, w_in, b_in, w_out, ids_TK, gates_TK, saved: Saved, act: Callable, n_siblings: int
) -> tuple:
    """Gradients of x, w_in, b_in, w_out and gates, in their dtypes.

    Args:
      dy_TE: of y, bfloat16.
      x_TE: as of `forward`, and so are the next.
      w_in: see there.
      b_in: see there.
      w_out: see there.
      ids_TK: see there.
      gates_TK: see there.
      saved: by `forward`.
      act: the activation.
      n_siblings: G.
    """
    (plan, z_NU), dtype = saved, x_TE.dtype
    together = lambda array: _together(array, n_siblings)
    v_in, v_out = together(w_in), together(w_out)
    dc_NU = _units(dy_TE, v_out.astype(dtype), jnp.zeros(v_in.shape[:2], jnp.float32), plan)
    gate_NU = _gates(gates_TK, plan, ids_TK, n_siblings, w_in.shape)
    h_NU, to_dz = jax.vjp(act, z_NU)
    (dz_NU,) = to_dz(dc_NU * gate_NU)
    chosen = lambda array_NU: jnp.where(gate_NU == 0, 0.0, array_NU).astype(dtype)
    dw_out, _ = _grads(chosen(h_NU * gate_NU), dy_TE, v_out, plan)
    dz_NU = chosen(dz_NU)
    dw_in, db_in = _grads(dz_NU, x_TE, v_in, plan)
    dx_TE = _sums(dz_NU, v_in.astype(dtype), plan)
    d_gate_NG = (h_NU * dc_NU)[:, : v_in.shape[1]].reshape(-1, n_siblings, w_in.shape[1]).sum(axis=2)
    d_gates_TK = d_gate_NG.at[_places(plan, ids_TK, n_siblings)].get(mode="promise_in_bounds")
    like = lambda grads, array: grads.reshape(array.shape).astype(array.dtype)
    return dx_TE, like(dw_in, w_in), like(db_in, b_in), like(dw_out, w_out), d_gates_TK


def probe() -> None:
    """Raises unless the kernels add up a small layer, with its gradients, as XLA does."""
    if not cuda.is_loaded("experts"):
        raise ArithmeticError("it is not loaded")
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    x_TE, dy_TE, ids_TK = draw(0, 100, 64), draw(1, 100, 64), (jnp.arange(100)[:, None] + jnp.arange(2)) % 8
    units, gates_TK = (draw(2, 8, 5, 64), draw(3, 8, 5), draw(4, 8, 5, 64)), jnp.abs(draw(5, 100, 2))

    def plain(x_TE, w_in, b_in, w_out, gates_TK):
        z_TKW = jnp.einsum("te,tkwe->tkw", x_TE, w_in[ids_TK]) + b_in[ids_TK]
        return jnp.einsum("tkw,tk,tkwe->te", jax.nn.silu(z_TKW), gates_TK, w_out[ids_TK])

    float32 = lambda arrays: jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
    want, back = jax.vjp(plain, *float32((x_TE, *units, gates_TK)))
    chosen = ids_TK, float32(gates_TK)
    y_TE, saved = forward(x_TE, *units, *chosen, jax.nn.silu, n_siblings=2)
    grads = backward(dy_TE, x_TE, *units, *chosen, saved, jax.nn.silu, n_siblings=2)
    for got, right in zip((y_TE, *grads), (want, *back(float32(dy_TE)))):
        if not jnp.linalg.norm(got.astype(jnp.float32) - right) < 2e-2 * jnp.linalg.norm(right):
            raise ArithmeticError("its sums are not those of XLA")
