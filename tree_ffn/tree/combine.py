"""Implementations: what chosen experts add up to. They see ids, gates, shapes and the activation only.

    s = sum over k of g[k] sum over the units u of expert ids[k] of act(<w_in[u], x> + b_in[u]) w_out[u]

An expert of a leaf layer is some rows of units of its own; of a path layer it is a path, whose units it
shares with others. The spec says where they stand: `runs` of rows, or `unit_gates`, a gate for every unit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_choice
from tree_ffn.tree import rows
from tree_ffn.tree.grouped import by_kernels, flat, grouped
from tree_ffn.tree.masked import masked as by_rows
from tree_ffn.tree.meshes import platform
from tree_ffn.tree.products import weighed_units


def combine(
    params: dict,
    x_TE: jax.Array,
    ids_TK: jax.Array,
    gates_TK: jax.Array,
    spec,
    implementation: str | None = None,
    leak: jax.Array | None = None,
) -> jax.Array:
    """The sum of the chosen experts, without b_out, of x's shape and dtype.

    Args:
      params: {w_in, b_in, w_out} of the layer.
      x_TE: tokens.
      ids_TK: of `route`.
      gates_TK: of `route`.
      spec: the layer, a LeafSpec or TreeSpec.
      implementation: a name of `IMPLEMENTATIONS`; None: the `fastest`.
      leak: float32 scalar of a dense start (`LeafSpec.leak_at`): every expert's gate is then leak +
        (1 - leak) g, g = 0 where it is not chosen. `masked` alone computes that.

    Raises:
      InputError: there is no such implementation, or it is another than `masked` and there is a leak.
    """
    if implementation is None and leak is None:
        return _by_rule(params, x_TE, ids_TK, gates_TK, spec)
    implementation = implementation or "masked"
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if leak is None:
        return IMPLEMENTATIONS[implementation](params, x_TE, ids_TK, gates_TK, spec)
    if implementation != "masked":
        raise InputError(
            f"implementation: {implementation!r} computes no expert that is not chosen, and a dense start "
            "needs all; use 'masked', or name none ('auto' in a config)."
        )
    return masked(params, x_TE, ids_TK, gates_TK, spec, leak)


def _by_rule(params, x_TE, ids_TK, gates_TK, spec):
    """The sum by what is fastest, and its derivatives by what learns fastest."""
    names = [fastest(params, x_TE, spec, learns) for learns in (False, True)]
    by = lambda name: lambda *layer: IMPLEMENTATIONS[name](*layer, spec)
    layer = by(names[0]) if names[0] == names[1] else with_derivatives(*map(by, names))
    return layer(params, x_TE, ids_TK, gates_TK)


def with_derivatives(forward: Callable, derived: Callable) -> Callable:
    """A function that computes as `forward` does, and is differentiated as `derived`, which equals it, is.

    Args:
      forward: of arrays and trees of them.
      derived: of the same.
    """
    both = jax.custom_jvp(forward)
    both.defjvp(lambda primals, tangents: jax.jvp(derived, primals, tangents))
    return both


def fastest(params: dict, x_TE: jax.Array, spec, learns: bool = False) -> str:
    """What was fastest for such tokens, as `fastest_on` the platform and with the kernels that are here.

    Args:
      params: the layer's arrays.
      x_TE: tokens; only their shape and dtype count.
      spec: the layer.
      learns: derivatives are taken.
    """
    n_tokens, width = x_TE.shape
    in_place = rows.in_place(x_TE.dtype, params["w_in"].dtype)
    compiled = in_place or by_kernels(params, x_TE, getattr(spec, "top_k", 0), spec)
    return fastest_on(platform(), compiled, n_tokens, width, spec, learns)


def fastest_on(platform: str, compiled: bool, n_tokens, width: int, spec, learns: bool = False) -> str:
    """What was fastest for so many tokens: results/speed_layer.jsonl.

    On a CPU, in times of masked's, E = 768, F = 3,072, A = 96, for 512 experts of 6 of which 16 are chosen, a
    tree of W = 12, and 12 of W = 1:

        forward, 1 token            gather .16 .12 .26, after `make kernels` .08 .03 .04
        forward, 16 tokens          gather .62 .51 1.2, after `make kernels` .37 .15 .26
        forward, 256 tokens         gather 2.8 1.9 2.5, after `make kernels` .32 .17 .68
        training, 256 tokens        gather - 2.2 2.5, whose rows XLA reads where derivatives are taken
        training, 4,096 tokens      grouped .87 .22; forward 1.2 .58 2.4

    On an H200, bfloat16, after `make kernels`, 512 experts of which 16 are chosen, E = 768, 2,048, 4,096:

        training, 16,384 tokens     grouped .73 .42 .28
        forward, 4,096 tokens       grouped - .56 .38

    On a TPU nothing was timed. Its compiler's estimates for a v5e, in cycles of dense's, of the same experts
    and widths (results/layer_tpu.jsonl):

        training, 16,384 tokens     masked 2.5 1.5 1.3; grouped 2.6 .59 .27, rows read by index left out

    Args:
      platform: cpu, gpu or tpu.
      compiled: whether kernels of `make kernels` compute such layers there.
      n_tokens: T; of an exported batch no number.
      width: E.
      spec: the layer.
      learns: derivatives are taken.
    """
    share = spec.active_units / spec.total_units
    if not isinstance(n_tokens, int):  # an exported batch has no number
        return "masked"
    in_a_row = spec.expert_width if hasattr(spec, "expert_width") else min(spec.shape.widths)
    by_xla = n_tokens <= 16 and n_tokens * share <= min(1, in_a_row / 3)
    in_place = platform == "cpu" and compiled and n_tokens <= 256 and share <= 1 / 16 and not learns
    straight = getattr(spec, "routing", "") == "straight_through"  # whose gradients `masked` alone computes
    if by_xla or (in_place and not straight):
        return "gather"
    if straight:
        return "masked"
    # A dense start is trained by masked alone: of such a layer only forward passes come here.
    trains = not getattr(spec, "dense_start", 0)
    on_cpu = platform == "cpu" and trains and n_tokens >= max(4096, 8 * spec.n_experts)
    on_gpu = platform == "gpu" and compiled and n_tokens * width >= 2**23
    return "grouped" if on_cpu or on_gpu else "masked"


def masked(params, x_TE, ids_TK, gates_TK, spec, leak=None) -> jax.Array:
    """Every unit of every token, those that are not chosen times 0: two dense products. For training.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      ids_TK: int32, the chosen experts.
      gates_TK: float32, their gates.
      spec: the layer.
      leak: float32 scalar, what experts that are not chosen add in a dense start; None: nothing.
    """
    if hasattr(spec, "row"):  # experts with units of their own
        return by_rows(params, x_TE, ids_TK, gates_TK, spec, leak)
    gate_TX = spec.unit_gates(params, ids_TK, gates_TK)
    if leak is not None:
        gate_TX = leak + (1 - leak) * gate_TX
    return weighed(params, x_TE, gate_TX, spec)


def weighed(params, x_TE, gate_TX: jax.Array, spec) -> jax.Array:
    """All units, in X groups of F / X in a row with one gate each.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      gate_TX: float32, one gate for every group.
      spec: the layer.
    """
    shape = (gate_TX.shape[1], -1)
    units = {name: params[name].reshape(*shape, x_TE.shape[1]) for name in ("w_in", "w_out")}
    return weighed_units(units | {"b_in": params["b_in"].reshape(shape)}, x_TE, spec.act, gate_TX)


def gather(params, x_TE, ids_TK, gates_TK, spec) -> jax.Array:
    """The rows of the chosen experts, read for each token by itself. For few tokens.

    Args:
      params: the layer's arrays.
      x_TE: tokens.
      ids_TK: int32, the chosen experts.
      gates_TK: float32, their gates.
      spec: the layer.
    """
    w_in, b_in, w_out = flat(params, x_TE.shape[1])
    s_TE = jnp.zeros(x_TE.shape, jnp.float32)
    for start_TKn, width in spec.runs(params, ids_TK):
        n = start_TKn.shape[-1]
        start_TK = start_TKn.reshape(ids_TK.shape[0], ids_TK.shape[1] * n)
        gate_TK = jnp.repeat(gates_TK, n, axis=1)
        z_TKW = rows.dots(x_TE, w_in, start_TK, width) + _float32(rows.rows(b_in, start_TK, width))
        s_TE += rows.sums((spec.act(z_TKW) * gate_TK[..., None]).astype(x_TE.dtype), w_out, start_TK)
    return s_TE.astype(x_TE.dtype)


def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


# A new one is an entry here; it may do as it likes, but for rounding, within what `combine` says.
IMPLEMENTATIONS = {"masked": masked, "gather": gather, "grouped": grouped}
