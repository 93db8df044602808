"""A leaf layer behind trees as a whole, for few tokens on an NVIDIA GPU, by `decode.cu`.

    ids, g = route(x);   s = sum over k of g[k] sum over the units u of expert ids[k] of act(z[u]) w_out[u]

Three kernels do it, four where there are several tokens: with so few a layer is as slow as its launches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree.kernels import cuda

ARRAYS = ("w_router", "b_router", "w_in", "b_in", "w_out")
MATRICES = ("w_router", "w_in", "w_out")
# As decode.cuh and decode_choice.cuh number them.
NORMS = ("none", "l1", "l2", "rms")
ACTIVATIONS = (
    "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu", "silu", "tanh", "identity", "abs", "softplus",
)  # fmt: skip
MOST_TOKENS, MOST_TOP_K, MOST_EXPERTS, COLUMNS, ROWS, CHUNK = 16, 16, 1024, 64, 16, 32
PARTS = 8  # at most, that a sum is computed in
BLOCKS = 256  # about two on each of Hopper's multiprocessors


def in_use(params: dict, x_TE, spec) -> bool:
    """Whether a program that is traced now computes a layer by the kernels.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      spec: the layer, of any kind.
    """
    return cuda.in_use("decode") and fit(params, x_TE, spec)


def fit(params: dict, x_TE, spec) -> bool:
    """Whether the kernels compute such a layer: behind trees, in bfloat16, not balanced, not pruned.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      spec: the layer, of any kind.
    """
    n_tokens, width = x_TE.shape
    if not isinstance(n_tokens, int) or not 0 < n_tokens <= MOST_TOKENS or width % COLUMNS:
        return False
    if getattr(spec, "router", "") != "tree" or not spec.depth:
        return False
    if spec.n_kept or spec.balance_rate or spec.top_k > MOST_TOP_K or spec.n_experts > MOST_EXPERTS:
        return False
    named = spec.gate_norm in NORMS and spec.activation in ACTIVATIONS
    biases = all(params[name].dtype in (jnp.bfloat16, jnp.float32) for name in ("b_router", "b_in"))
    return named and biases and all(params[name].dtype == jnp.bfloat16 == x_TE.dtype for name in MATRICES)


def results(n_tokens: int, width: int, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what the kernels write.

    Returns:
      parts of the sum, float32 [J, T, E]; ids, int32 [T, K]; the rest are what one kernel leaves to the next.

    Args:
      n_tokens: T.
      width: E.
      spec: the layer.
    """
    filled = lambda n: -(-n // ROWS) * ROWS
    n_rows, n_units, n_pairs = filled(spec.router_rows), filled(spec.expert_width), n_tokens * spec.top_k
    split = lambda blocks, most: max(1, min(PARTS, width // CHUNK, most // blocks))
    parts, groups = split(n_rows // ROWS, BLOCKS), split(width // COLUMNS, BLOCKS)
    unit_parts = split(n_pairs * n_units // ROWS, BLOCKS // 2) if n_tokens == 1 else 1
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return (
        float32(groups, n_tokens, width),
        int32(n_tokens, spec.top_k),
        float32(n_tokens, spec.top_k),
        float32(parts, n_tokens, n_rows),
        float32(unit_parts, n_pairs, n_units),
        int32(1 + n_pairs, 4),
    )


def layer(x_TE, w_router, b_router, w_in, b_in, w_out, spec) -> tuple[jax.Array, jax.Array]:
    """What the chosen experts add up to, bfloat16 [T, E], and their ids, the likeliest first, int32 [T, K].

    Args:
      x_TE: bfloat16.
      w_router: bfloat16 [R, E].
      b_router: [R].
      w_in: bfloat16 [X, W, E].
      b_in: [X, W].
      w_out: bfloat16 [X, W, E].
      spec: the layer.
    """
    n_tokens, width = x_TE.shape
    numbers = {
        "trees": spec.n_trees,
        "depth": spec.depth,
        "norm": NORMS.index(spec.gate_norm),
        "activation": ACTIVATIONS.index(spec.activation),
    }
    y_JTE, ids_TK, *_ = jax.ffi.ffi_call("tree_ffn_decode", results(n_tokens, width, spec))(
        x_TE, w_router, b_router, w_in, b_in, w_out, **{name: np.int64(n) for name, n in numbers.items()}
    )
    s_TE = y_JTE[0]
    for part_TE in y_JTE[1:]:  # part of what reads the sum, where a reduction would be one kernel more
        s_TE += part_TE
    return s_TE.astype(x_TE.dtype), ids_TK


def probe() -> None:
    """Raises unless the kernels compute what XLA computes, of one token and of several."""
    from tree_ffn.tree.leaf import LeafSpec, init_params, leaf_ffn  # which imports this module

    if not cuda.is_loaded("decode"):
        raise ArithmeticError("it is not loaded")
    spec = LeafSpec(n_experts=64, expert_width=5, top_k=6, n_trees=2)
    params = init_params(jax.random.key(0), spec, 128, param_dtype=jnp.bfloat16)
    for n_tokens in (1, 3, 16):
        x_TE = jax.random.normal(jax.random.key(n_tokens), (n_tokens, 128), jnp.bfloat16)
        s_TE, ids_TK = layer(x_TE, **{name: params[name] for name in ARRAYS}, spec=spec)
        wanted_TE, info = leaf_ffn(params, x_TE, spec, "masked")
        same_T1 = (ids_TK == info.leaf_TP).all(axis=1, keepdims=True)
        apart_TE, wanted_TE = (
            jnp.where(same_T1, a.astype(jnp.float32), 0) for a in (s_TE - wanted_TE, wanted_TE)
        )
        if not (same_T1.mean() > 0.9 and jnp.linalg.norm(apart_TE) < 2e-2 * jnp.linalg.norm(wanted_TE)):
            raise ArithmeticError("its sums are not those of XLA")
