"""The one public function of the layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError, check_choice
from tree_ffn.tree import gather, grouped, masked
from tree_ffn.tree.activations import activation
from tree_ffn.tree.products import weighed_units
from tree_ffn.tree.routing import check_ids
from tree_ffn.tree.spec import Info, PrunedSpec, TreeSpec
from tree_ffn.tree.weights import array_shapes

IMPLEMENTATIONS = {"masked": masked.trees, "gather": gather.trees, "grouped": grouped.trees}


def tree_ffn(
    params: dict,
    x_TE: jax.Array,
    spec: TreeSpec,
    implementation: str | None = None,
    token_T: jax.Array | None = None,
    leak: jax.Array | None = None,
) -> tuple[jax.Array, Info]:
    """A feed-forward layer of P trees: every token walks one hard path per tree.

        z[p,n,u] = <w_in[p,n,u], x> + b_in[p,n,u]
        r[p,n]   = z[p,n,0] - threshold[p,n]
        n_0 = 0;  n_{l+1} = 2 n_l + 1 + [r[p,n_l] > 0]
        y = b_out + sum_p sum_l g[p,l] sum_u act(z[p,n_l,u]) w_out[p,n_l,u]
                  + sum_s act(<w_in_shared[s], x> + b_in_shared[s]) w_out_shared[s]

    At `act_site="sum"` units enter the sum linearly, shared ones too, and
    y = b_out + act(sum). The gate g is 1 but under continuous routing. With a leak, which only training
    has, the units off the path add too: leak act(z) w_out each.

    Args:
      params: see `weights.init_params`.
      x_TE: tokens [T, E], float32 or bfloat16; weights are cast to its dtype,
        decision logits are float32.
      spec: the layer; static under jit.
      implementation: `masked`, `gather` or `grouped`; None picks one by the
        rule of `pick_implementation`. All compute the same function.
      token_T: int32 ids of the tokens; only `hash_levels` read them.
      leak: float32 scalar, `Leaking.leak_at`; masked execution alone has it.

    Returns:
      y_TE in x's dtype, and Info(leaf_TP, aux_loss=0).

    Raises:
      InputError: an unknown implementation, one without a leak where there is one, or tokens, ids or
        weights that do not fit the spec.

    Example:
      >>> from tree_ffn.tree import TreeShape, TreeSpec, init_params
      >>> spec = TreeSpec(TreeShape(n_trees=2, depth=3))
      >>> params = init_params(jax.random.key(0), spec, width=8)
      >>> y_TE, info = tree_ffn(params, jnp.ones((5, 8)), spec)
      >>> y_TE.shape, info.leaf_TP.shape
      ((5, 8), (5, 2))

    Source: "Dynamic sparsity in tree-structured feed-forward layers at scale",
    arXiv 2604.08565; hard routing with exact GELU, W = 1 and b_out = 0 is the
    layer of UltraFastBERT, arXiv 2311.10770.
    """
    check_fit(params, x_TE, spec, token_T)
    s_TE, leaf_TP = sum_of_trees(params, x_TE, spec, implementation, token_T, leak)
    return finish(params, x_TE, s_TE, spec), Info(leaf_TP, jnp.zeros((), jnp.float32))


def finish(params: dict, x_TE: jax.Array, s_TE: jax.Array, spec: TreeSpec) -> jax.Array:
    """y from the sum of the trees: adds the shared units, the activation of site `sum`, and b_out."""
    if spec.shape.shared_width:
        s_TE = s_TE + _shared(params["shared"], x_TE, spec)
    if spec.act_site == "sum":
        act = activation(spec.activation)
        s_TE = act(s_TE.astype(jnp.float32)).astype(x_TE.dtype)
    return s_TE + params["b_out"].astype(x_TE.dtype)[None]


def pick_implementation(spec: TreeSpec, n_tokens: int, backend: str, in_place: bool = False) -> str:
    """The execution that was fastest where layers of this kind were measured.

    The rule follows results/speed_layer.jsonl (experiments/benchmark.py): forward
    passes of few tokens, training steps of many. It is within 30 % of the best
    there, and a guess between the measured sizes. On a CPU gather wins up to 16
    tokens, masked at 256, and grouped at 4,096 unless there are many trees. On a
    GPU grouped wins at 16,384 tokens with one tree (E = 768 and 2,048; whole
    models too, in results/speed_steps.jsonl), masked at 4,096; with 96 trees
    masked wins for one token and from 256 on, and gather for 16.

    Args:
      spec: the layer.
      n_tokens: T.
      backend: `cpu`, `gpu` or `tpu`.
      in_place: a CPU reads rows where they lie (`gather.in_place`): then gather is for up to 256 tokens.
    """
    shape, few = spec.shape, 256 if in_place else 16
    if isinstance(spec, PrunedSpec):  # not measured; there is no masked execution of it
        return "gather" if n_tokens <= (few if backend == "cpu" else 8) else "grouped"
    if backend == "cpu":
        if n_tokens <= few:
            return "gather"
        return "grouped" if n_tokens >= 512 and shape.n_trees <= 16 else "masked"
    if backend == "gpu" and n_tokens in (range(2, 17) if shape.n_trees > 16 else range(1, 9)):
        return "gather"
    wide = shape.n_trees <= 2 and shape.path_units >= 64
    return "grouped" if backend == "gpu" and wide and n_tokens >= 8192 else "masked"


def sum_of_trees(
    params: dict, x_TE: jax.Array, spec: TreeSpec, implementation: str | None = None, token_T=None, leak=None
):
    """(s_TE, leaf_TP): what the trees add up to, before `finish`; some trees give a part of the sum."""
    if leak is not None:
        check_leaks(spec, implementation)
        return masked.trees(params, x_TE, spec, token_T, leak)
    if implementation is not None:
        check_implementation(spec, implementation)
    if not len(x_TE):  # what is blocked, sorted or reshaped needs a token
        return x_TE, jnp.zeros((0, spec.shape.n_trees), jnp.int32)
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](params, x_TE, spec, token_T)
    in_place = gather.in_place(x_TE.dtype, params["w_in"].dtype)
    chosen = pick_implementation(spec, x_TE.shape[0], jax.default_backend(), in_place)
    if spec.routing == "straight_through" and chosen != "masked" and not isinstance(spec, PrunedSpec):
        return _masked_backward(spec, chosen, params, x_TE, token_T)
    return IMPLEMENTATIONS[chosen](params, x_TE, spec, token_T)


def check_implementation(spec: TreeSpec, implementation: str) -> None:
    """Raises InputError for an unknown execution, or one that the layer does not have."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "masked" and isinstance(spec, PrunedSpec):
        raise InputError(
            "implementation: 'masked' cannot execute a pruned layer; use 'gather' or 'grouped', or name none "
            "('auto' in a config) to have one chosen."
        )


def check_leaks(spec: TreeSpec, implementation: str | None) -> None:
    """Raises InputError unless a layer has units off the path, and its execution computes them."""
    if isinstance(spec, PrunedSpec):
        raise InputError("leak: a pruned layer has none; leave it out.")
    if implementation not in (None, "masked"):
        raise InputError(
            f"implementation: {implementation!r} computes no unit off the path, and so none that leaks; use "
            "'masked', or name none ('auto' in a config)."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _masked_backward(spec, implementation, params, x_TE, token_T):
    """The fast execution where nothing is differentiated, the masked one where something is."""
    return IMPLEMENTATIONS[implementation](params, x_TE, spec, token_T)


def _masked_backward_fwd(spec, implementation, params, x_TE, token_T):
    del implementation
    return jax.vjp(lambda p, x: masked.trees(p, x, spec, token_T), params, x_TE, has_aux=False)


def _masked_backward_bwd(spec, implementation, vjp, cotangents):
    del spec, implementation
    return *vjp(cotangents), None


_masked_backward.defvjp(_masked_backward_fwd, _masked_backward_bwd)


def _shared(shared, x_TE, spec):
    """Output of the S units that are always on."""
    act = activation(spec.activation) if spec.act_site == "node" else lambda z: z
    return weighed_units(shared, x_TE, act)


def check_fit(params: dict, x_TE: jax.Array, spec: TreeSpec, token_T: jax.Array | None = None) -> None:
    """Raises InputError unless tokens, the ids that `hash_levels` read, and weights are those of a layer."""
    if x_TE.ndim != 2:
        raise InputError(f"x: shape {x_TE.shape} is not allowed; use [tokens, width].")
    if not jnp.issubdtype(x_TE.dtype, jnp.floating):
        raise InputError(f"x: dtype {x_TE.dtype} is not allowed; use float32 or bfloat16.")
    if spec.hash_levels and token_T is not None:
        check_ids(token_T, len(x_TE))
    for name, wanted in array_shapes(spec, x_TE.shape[1]).items():
        found: Any = params
        for part in name.split("."):
            found = found.get(part) if found is not None else None
        if found is None:
            raise InputError(f"{name}: is missing; the spec and x need an array of shape {wanted}.")
        if found.shape != wanted:
            raise InputError(f"{name}: shape {found.shape} does not fit the spec and x, which need {wanted}.")
