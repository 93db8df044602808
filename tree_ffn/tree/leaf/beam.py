"""The beam: how the experts at the leaves of P trees are found, from the roots down.

    log p(root) = 0,   log p(child of n) = log p(n) + log s(r[n]) to the right, log s(-r[n]) to the left

r[n] = <w[n], x> + b[n] is the logit of node n, s the logistic function. Of each level the K likeliest among
the children of what is kept above are kept, and their rows asked: min(P 2^level, K). Nodes are numbered as
the rows of the router are: level by level from the roots, in each level tree by tree. The children of n are
2 n + P and 2 n + P + 1, and expert j is node X - P + j.

This one function is executed in two ways: by one product with all rows, of which the search reads some, on a
GPU after `make kernels` as one kernel; or, for few tokens on a CPU after `make kernels`, by reading the rows
that are asked, level after level. Derivatives are always those of the first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tree_ffn.tree import chosen, kernels, rows
from tree_ffn.tree.kernels import search
from tree_ffn.tree.kernels.primitives import by_kernel_on, linear
from tree_ffn.tree.leaf.order import best, comparable, taken
from tree_ffn.tree.meshes import platform
from tree_ffn.tree.products import CHOICE, separate_product


def beam(params: dict, x_TE: jax.Array, spec) -> tuple[jax.Array, jax.Array]:
    """The K leaves that a token's search finds, and their log p: int32 and float32 [T, K].

    Args:
      params: {w_router [R,E], b_router [R]}; where the load is balanced selection_bias [R], which is added to
        the logits by which nodes are kept, not to log p; of a pruned layer kept_row [X].
      x_TE: tokens.
      spec: a LeafSpec with trees.
    """
    names = ("w_router", "b_router", "selection_bias", "kept_row")
    return _beam({name: params[name] for name in names if name in params}, x_TE, spec)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _beam(params: dict, x_TE: jax.Array, spec):
    n_tokens, width = x_TE.shape
    is_known = isinstance(n_tokens, int)  # an exported batch has no number
    if is_known and few(n_tokens, width, spec) and rows.in_place(x_TE.dtype, params["w_router"].dtype):
        return tuple(_in_place.bind(x_TE, *params.values(), names=tuple(params), spec=spec))
    return of_all_rows(params, x_TE, spec)


@_beam.defjvp
def _beam_jvp(spec, primals, tangents):
    return jax.jvp(lambda params, x_TE: of_all_rows(params, x_TE, spec), primals, tangents)


def few(n_tokens: int, width: int, spec) -> bool:
    """Whether reading the rows that are asked is faster than one product with all rows.

    The bounds are measured: `python -m experiments.benchmark route` times both ways.

    Args:
      n_tokens: T.
      width: E.
      spec: the layer.
    """
    return n_tokens <= width / 48 and spec.routers_asked < spec.router_rows / 4


def of_all_rows(params: dict, x_TE: jax.Array, spec):
    """`beam` by one product with all rows.

    Args:
      params: the layer's, of which w_router and b_router are read.
      x_TE: tokens.
      spec: the layer.
    """
    r_TS, b_R = separate_product(x_TE, params["w_router"]), params["b_router"].astype(jnp.float32)
    fixed = jax.lax.stop_gradient((r_TS, b_R))
    if search.in_use(x_TE.shape[0], spec):
        bias_R = params.get("selection_bias", jnp.zeros(0)).astype(jnp.float32)
        ids_TK, log_p_TK = _on_gpu.bind(*fixed, bias_R, spec=spec)
        return ids_TK, _of_paths((spec, x_TE.dtype), log_p_TK, r_TS, b_R, ids_TK)
    ids_TK, log_p_TK = (checkpoint_name(found, CHOICE) for found in of_logits(params, *fixed, spec))
    return ids_TK, _of_paths((spec, None), log_p_TK, r_TS, b_R, ids_TK)


def of_logits(params: dict, r_TS: jax.Array, b_R: jax.Array, spec):
    """`beam` of logits, by XLA.

    Args:
      params: the layer's, of which selection_bias and kept_row are read.
      r_TS: float32 logits without biases, filled up to S.
      b_R: float32 biases.
      spec: the layer.
    """
    logits_TS = r_TS + jnp.pad(b_R, (0, r_TS.shape[1] - b_R.size))[None]
    return _search(params, r_TS.shape[0], spec, lambda level, node_TN: _at(logits_TS, level, node_TN, spec))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_paths(how: tuple, log_p_TK, r_TS, b_R, ids_TK):
    """What the search found, log p, to be differentiated by the logits as the sum over each leaf's path.

    Differentiating the search itself would add up, level by level, at rows that are read by index.

    Args:
      how: the layer, and the dtype of the gradient that a kernel computes; None: XLA does.
      log_p_TK: of the leaves.
      r_TS: logits without biases.
      b_R: biases.
      ids_TK: the leaves.
    """
    return log_p_TK


@_of_paths.defjvp
def _of_paths_jvp(how, primals, tangents):
    (spec, dtype), (_, r_TS, b_R, ids_TK), (_, dr_TS, db_R, _) = how, primals, tangents
    if dtype is None:
        # Of the backward pass nothing is kept but the logits.
        moved = jax.checkpoint(functools.partial(_moved, spec=spec), prevent_cse=False)
        (d_TK,) = moved(r_TS, b_R, ids_TK, dr_TS, db_R)
    else:
        (d_TK,) = _moved_on_gpu.bind(r_TS, b_R, ids_TK, dr_TS, db_R, spec=spec, dtype=dtype)
    return _of_paths(how, *primals), d_TK


def _moved(r_TS, b_R, ids_TK, dr_TS, db_R, spec, dtype=None):
    """How log p of leaves moves with logits and biases."""
    r_TR, d_TR = r_TS[:, : b_R.size] + b_R[None], dr_TS[:, : b_R.size] + db_R[None]
    # A node that is no number moves no leaf; whatever is below it is none itself.
    right_TR = jax.nn.sigmoid(jnp.where(jnp.isnan(r_TR), 0.0, r_TR))
    d_TN = jnp.zeros((r_TS.shape[0], spec.n_trees), d_TR.dtype)
    for level in range(spec.depth):
        rows = slice(_first(level, spec), _first(level + 1, spec))
        p_TN, by_TN = right_TR[:, rows], d_TR[:, rows]
        d_TN = _side_by_side(d_TN - p_TN * by_TN, d_TN + (1 - p_TN) * by_TN)
    return (chosen.read(d_TN, ids_TK),)


def of_asked_rows(params: dict, x_TE: jax.Array, spec):
    """`beam` by `kernels`: the rows of the levels that are kept whole at once, then those that are asked.

    Args:
      params: the layer's, of which w_router and b_router are read.
      x_TE: tokens.
      spec: the layer.
    """
    w_RE, b_R, n_tokens = params["w_router"], params["b_router"].astype(jnp.float32), x_TE.shape[0]
    n_whole = min(spec.n_trees * (2 ** (spec.top_k // spec.n_trees).bit_length() - 1), spec.router_rows)
    whole_TR = kernels.dots(x_TE, w_RE, jnp.zeros((n_tokens, 1), jnp.int32), n_whole)[:, 0]

    def logit(level: int, node_TN: jax.Array) -> jax.Array:
        if _is_whole(level, spec):
            z_TN = _at(whole_TR, level, node_TN, spec)
        else:
            z_TN = kernels.dots(x_TE, w_RE, node_TN, 1)[..., 0]
        return z_TN + _at(b_R[None], level, node_TN, spec)

    return _search(params, n_tokens, spec, logit)


def _search(params: dict, n_tokens, spec, logit: Callable[[int, jax.Array], jax.Array]):
    """The search: `logit` gives the logits of the nodes [T, N] that are kept of a level."""
    P, top_k = spec.n_trees, spec.top_k
    bias_R = params["selection_bias"].astype(jnp.float32)[None] if "selection_bias" in params else None
    node_TN = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (n_tokens, P))
    scores = [jnp.zeros(node_TN.shape, jnp.float32)] * (1 if bias_R is None else 2)  # log p; the last decides
    for level in range(spec.depth):
        logits = [logit(level, node_TN)]
        if bias_R is not None:
            logits.append(logits[0] + _at(bias_R, level, node_TN, spec))
        scores = [_of_children(score_TN, r_TN) for score_TN, r_TN in zip(scores, logits)]
        node_TN = _side_by_side(2 * node_TN + P, 2 * node_TN + P + 1)
        if node_TN.shape[1] > top_k:
            is_there_TN = _is_there(params["kept_row"], level + 1, node_TN, spec) if spec.n_kept else None
            score_TN = comparable(scores[-1], is_there_TN)
            which_TKN = best(score_TN, node_TN, top_k)
            node_TN, *scores = (taken(array_TN, which_TKN) for array_TN in (node_TN, *scores))
    return node_TN - _first(spec.depth, spec), scores[0]


def _of_children(log_p_TN: jax.Array, r_TN: jax.Array) -> jax.Array:
    """log p of the children of nodes: [T, 2 N]."""
    both_TN = jnp.log1p(jnp.exp(-jnp.abs(r_TN)))  # log s(r) = min(r, 0) - both
    return _side_by_side(*(log_p_TN + (jnp.minimum(side_TN, 0.0) - both_TN) for side_TN in (-r_TN, r_TN)))


def _side_by_side(left_TN: jax.Array, right_TN: jax.Array) -> jax.Array:
    """Of the left and the right child of each node, one after the other: [T, 2 N].

    XLA puts what is stacked into memory: the comparisons that follow do not compute it anew for each pair.
    """
    return jnp.stack([left_TN, right_TN], axis=-1).reshape(left_TN.shape[0], 2 * left_TN.shape[1])


def _is_there(kept_row_X: jax.Array, level: int, node_TN: jax.Array, spec) -> jax.Array:
    """Whether an expert is left at or below nodes."""
    is_there_N = (kept_row_X >= 0).reshape(spec.n_trees * 2**level, -1).any(axis=1)
    return is_there_N.at[node_TN - _first(level, spec)].get(mode="promise_in_bounds")


def _first(level: int, spec) -> int:
    """The first node of a level."""
    return spec.n_trees * (2**level - 1)


def _is_whole(level: int, spec) -> bool:
    """Whether a search keeps all nodes of a level, in order."""
    return spec.n_trees * 2**level <= spec.top_k


def _at(of_rows_TR: jax.Array, level: int, node_TN: jax.Array, spec) -> jax.Array:
    """What the rows of nodes have, of an array [T, R] or one [1, R] for all tokens."""
    of_level_TN = of_rows_TR[:, _first(level, spec) : _first(level + 1, spec)]
    if _is_whole(level, spec):
        return of_level_TN
    if platform() == "tpu":
        return chosen.read(of_level_TN, node_TN - _first(level, spec))
    return jnp.take_along_axis(of_rows_TR, node_TN, axis=1, mode="promise_in_bounds")


def _named(run: Callable) -> Callable:
    """A function of params, tokens and spec as one of arrays, whose names are given apart."""
    return lambda x_TE, *values, names, spec: run(dict(zip(names, values)), x_TE, spec)


_in_place = by_kernel_on("cpu", "tree_ffn_beam", _named(of_all_rows), _named(of_asked_rows))


def _on_gpu_by_xla(r_TS, b_R, bias_R, spec):
    return of_logits({"selection_bias": bias_R} if bias_R.size else {}, r_TS, b_R, spec)


def gradient(r_TS, b_R, ids_TK, d_TK, spec, dtype=None):
    """Cotangents of logits and biases from those of log p of leaves, by XLA; in float32.

    Args:
      r_TS: logits without biases, filled up to S.
      b_R: biases.
      ids_TK: the leaves.
      d_TK: of log p.
      spec: the layer.
      dtype: of what a kernel gives in its place.
    """
    moved = lambda dr_TS, db_R: _moved(r_TS, b_R, ids_TK, dr_TS, db_R, spec)
    return tuple(jax.linear_transpose(moved, r_TS, b_R)((d_TK,)))


def _gradient_by_kernel(r_TS, b_R, ids_TK, d_TK, spec, dtype):
    d_TS, d_R = search.gradient(r_TS, b_R, ids_TK, d_TK, spec, dtype)
    return d_TS.astype(jnp.float32), d_R  # which the product's own derivative rounds to that dtype anyway


_on_gpu = by_kernel_on("cuda", "tree_ffn_search", _on_gpu_by_xla, search.beam)
_gradient_on_gpu = by_kernel_on("cuda", "tree_ffn_search_gradient", gradient, _gradient_by_kernel)
_moved_on_gpu = linear("tree_ffn_search_moved", _moved, 3, _gradient_on_gpu)
