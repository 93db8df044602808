"""`grouped` on a TPU: pairs of a token and a tile, G neighbouring experts whose units fill the 128 lanes.

An expert of 6 units alone would leave 95 % of the lanes empty, and of a tree's leaves a token chooses
neighbours more often than others. A pair p is a token t and a tile e, of which it chose one expert at least;
those that it did not choose have gate 0. Pairs are sorted by tile:

    z[p] = <x[t], w_in[e]> + b_in[e],   h[p] = g[p] act(z[p]),   y[t] = sum over t's pairs of h[p] w_out[e]

There are T K places, as many as pairs at most; products stop at the last pair, what is read by index does
not. What a pair adds is rounded before a token adds it up. First derivatives alone, in reverse mode, and no
batches of layers by `jax.vmap`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from tree_ffn.tree.kernels import experts

LANES = 128
BLOCK = 128  # places are filled up to a multiple of so many, as the kernel of weights' gradients asks


class Plan(NamedTuple):
    """Where pairs stand: N places for K T choices, the last of them empty where tokens chose neighbours.

    Attributes:
      order_N: int32, the choice k T + t of every place; pairs come first, by tile.
      place_N: int32, the place of every choice.
      tile_N: int32, e of every place; of those without a pair the number of tiles.
      sizes_X: int32, pairs of every tile.
      is_pair_KT: bool, whether a choice has a pair: it is its token's first in a tile.
    """

    order_N: jax.Array
    place_N: jax.Array
    tile_N: jax.Array
    sizes_X: jax.Array
    is_pair_KT: jax.Array


def by_tiles(params: dict, x_TE: jax.Array, ids_TK: jax.Array, gates_TK: jax.Array, spec) -> jax.Array:
    """The sum of the chosen experts: [T, E] of x's dtype.

    Args:
      params: the layer's arrays, an expert being units of its own.
      x_TE: tokens.
      ids_TK: int32, the chosen experts.
      gates_TK: float32, their gates.
      spec: a LeafSpec.
    """
    if not ids_TK.size:
        return x_TE
    dtype, n_siblings = x_TE.dtype, experts.siblings(spec, spec.n_experts, LANES)
    units = [_tiles(params[name], spec, n_siblings) for name in ("w_in", "b_in", "w_out")]

    # Recomputed in the backward pass: tokens that are read K times are many bytes.
    @jax.checkpoint
    def total(x_TE, w_XUE, b_XU1, v_XUE, gates_KT, row_KT):
        plan, w_XEU = _plan(row_KT // n_siblings, len(w_XUE)), w_XUE.astype(dtype).swapaxes(1, 2)
        gate_NU = _gates(gates_KT, row_KT, plan, n_siblings, spec.expert_width, w_XUE.shape[1])
        b_NU = _biases(b_XU1[..., 0].astype(jnp.float32), plan)
        z_NU = jnp.add(_product(_read(x_TE, plan), w_XEU, plan.sizes_X, jnp.dtype("float32")), b_NU)
        z_NU = jnp.where(gate_NU == 0, 0.0, z_NU)  # where there is no pair a product may have written nothing
        h_NU = (spec.act(z_NU) * gate_NU).astype(dtype)
        return _added(_product(h_NU, v_XUE.astype(dtype), plan.sizes_X, dtype), plan)

    return total(x_TE, *units, gates_TK.T, spec.row(params, ids_TK).T)


def _tiles(array: jax.Array, spec, n_siblings: int) -> jax.Array:
    """Units of neighbours in a row, filled up to lanes: [X / G, U, E], of biases [X / G, U, 1]."""
    array = array.reshape(spec.kept_experts, spec.expert_width, -1)
    array = jnp.pad(array, ((0, -len(array) % n_siblings), (0, 0), (0, 0)))
    array = array.reshape(len(array) // n_siblings, -1, array.shape[2])
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % LANES), (0, 0)))


def _plan(tile_KT: jax.Array, n_tiles: int) -> Plan:
    top_k = len(tile_KT)
    is_before_KK = jnp.arange(top_k)[None] < jnp.arange(top_k)[:, None]
    is_pair_KT = ~((tile_KT[:, None] == tile_KT[None]) & is_before_KK[..., None]).any(axis=1)
    tile_N = _filled(jnp.where(is_pair_KT, tile_KT, n_tiles).reshape(-1), n_tiles)
    number_N = jnp.arange(tile_N.size, dtype=jnp.int32)
    tile_N, order_N = jax.lax.sort((tile_N, number_N), num_keys=1)
    place_N = jax.lax.sort((order_N, number_N), num_keys=1)[1]
    sizes_X = (tile_N[:, None] == jnp.arange(n_tiles)[None]).sum(axis=0, dtype=jnp.int32)
    return Plan(order_N, place_N, tile_N, sizes_X, is_pair_KT)


def _filled(array: jax.Array, value) -> jax.Array:
    """Filled up to whole blocks along the last axis."""
    more = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % BLOCK)]
    return jnp.pad(array, more, constant_values=value)


def _gates(gates_KT, row_KT, plan: Plan, n_siblings: int, width: int, n_units: int) -> jax.Array:
    """Of every unit of every pair, 0 where it was not chosen or there is no pair: [N, U]."""
    row_GKT = (row_KT // n_siblings * n_siblings)[None] + jnp.arange(n_siblings)[:, None, None]
    each = zip(row_KT[:, None, None], gates_KT[:, None, None])
    of_each = [jnp.where(row_11T == row_GKT, gate_11T, 0) for row_11T, gate_11T in each]
    gate_GKT = jnp.where(plan.is_pair_KT[None], functools.reduce(jnp.add, of_each), 0)
    gate_GN = _filled(gate_GKT.reshape(n_siblings, -1), 0)
    is_its_GU = jnp.arange(n_units)[None] // width == jnp.arange(n_siblings)[:, None]
    gate_NU = _exactly(gate_GN.T, is_its_GU.astype(jnp.float32))
    to, back = (lambda by, rows: _rows(rows, by[0])), (lambda by, rows: _rows(rows, by[1]))
    return linear_call(to, back, (plan.order_N, plan.place_N), gate_NU)


def _biases(b_XU: jax.Array, plan: Plan) -> jax.Array:
    """Of the tile of every place: [N, U]."""
    to = lambda tile_N, b_XU: _rows(b_XU, jnp.minimum(tile_N, len(b_XU) - 1))
    back = lambda tile_N, d_NU: _exactly((tile_N[:, None] == jnp.arange(len(b_XU))[None]).T, d_NU)
    return linear_call(to, back, plan.tile_N, b_XU)


def _exactly(one: jax.Array, other: jax.Array) -> jax.Array:
    """A product in float32 with a side of zeros and ones: numbers, or their sums, as they are."""
    return jnp.matmul(one.astype(jnp.float32), other, precision="highest")


def _rows(array: jax.Array, at: jax.Array) -> jax.Array:
    return array.at[at].get(mode="promise_in_bounds")


def _read(x_TE: jax.Array, plan: Plan) -> jax.Array:
    """x of the token of every place: [N, E]."""
    return linear_call(_of_places, _of_tokens, plan, x_TE)


def _added(s_NE: jax.Array, plan: Plan) -> jax.Array:
    """What its pairs add to a token: [T, E]."""
    return linear_call(_of_tokens, _of_places, plan, s_NE)


def _of_places(plan: Plan, x_TE):
    return _rows(x_TE, plan.order_N % plan.is_pair_KT.shape[1])


def _of_tokens(plan: Plan, s_NE):
    top_k, n_tokens = plan.is_pair_KT.shape
    s_KTE = _rows(s_NE, plan.place_N[: top_k * n_tokens]).reshape(top_k, n_tokens, -1)
    of_pair = lambda is_T, s_TE: jnp.where(is_T[:, None], s_TE, 0).astype(jnp.float32)
    return functools.reduce(jnp.add, map(of_pair, plan.is_pair_KT, s_KTE)).astype(s_NE.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_NI, w_XIO, sizes_X, dtype):
    """Of each place with the array of its tile: [N, O] of a dtype."""
    return jax.lax.ragged_dot(x_NI, w_XIO, sizes_X, preferred_element_type=dtype)


def _forward(x_NI, w_XIO, sizes_X, dtype):
    return _product(x_NI, w_XIO, sizes_X, dtype), (x_NI, w_XIO, sizes_X)


def _backward(dtype, saved, dy_NO):
    """XLA would multiply all places with all tiles for the gradients of weights (libtpu 0.0.42)."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_NI, w_XIO, sizes_X = saved
    dy_NO = dy_NO.astype(x_NI.dtype)
    dx_NI = _product(dy_NO, w_XIO.swapaxes(1, 2), sizes_X, x_NI.dtype)
    # Which counts on both, whatever a user has set.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        dw_XIO = tgmm(x_NI.T, dy_NO, sizes_X, preferred_element_type=w_XIO.dtype)
    return dx_NI, dw_XIO, None


_product.defvjp(_forward, _backward)
