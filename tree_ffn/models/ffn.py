"""One interface to every feed-forward layer: dense, leaf, path."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tree_ffn.errors import InputError
from tree_ffn.models import dense
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.sharded import sharded_tree_ffn
from tree_ffn.models.spec import FFNSpec
from tree_ffn.tree import Info, LeafSpec, TreeSpec, leaf, path
from tree_ffn.tree.path import pruned
from tree_ffn.tree.usage import visit_counts

# Leaves that no optimizer touches; they live in the collection "routing".
ROUTING_NAMES = ("threshold", "router", "selection_bias", "salt", "kept_row", *pruned.STRUCTURE)


class Units(NamedTuple):
    """F, the units of a layer, and A, those that are active for a token."""

    total: int
    active: int


def units(spec: FFNSpec) -> Units:
    """F and A of a layer; a router's own weights count in neither.

    Example:
      >>> units(LeafSpec(n_experts=512, expert_width=6, top_k=16))
      Units(total=3072, active=96)
    """
    if isinstance(spec, DenseSpec):
        return Units(spec.width, spec.width)
    return Units(spec.total_units, spec.active_units)


def total_units(spec: FFNSpec) -> int:
    """F."""
    return units(spec).total


def active_units(spec: FFNSpec) -> int:
    """A."""
    return units(spec).active


def active_share(spec: FFNSpec) -> float:
    """A / F."""
    return units(spec).active / units(spec).total


def ffn_params(spec: FFNSpec, width: int) -> int:
    """Trained parameters: w_in and b_in of units and routers, w_out of units, b_out; experts' routers."""
    router = 0
    if isinstance(spec, LeafSpec):
        sizes = {"w_router": width, "b_router": 1}
        router = spec.router_rows * sum(sizes[name] for name in spec.router_params)
    return total_units(spec) * (2 * width + 1) + width + router


def ffn_flops(spec: FFNSpec, width: int) -> int:
    """Multiply-adds x 2 of one token's forward pass: its A units, and routers that are not units.

    What the layer needs, not what an implementation spends: `masked` computes all F units.
    """
    return 4 * active_units(spec) * width + 2 * separate_routers(spec) * width


def separate_routers(spec: FFNSpec) -> int:
    """Products of E numbers a token, beside those of units, by which routers that are no units decide."""
    if isinstance(spec, LeafSpec):
        return spec.routers_asked
    return spec.n_routers if isinstance(spec, TreeSpec) else 0


def products(spec: FFNSpec) -> int:
    """Dot products of E numbers that a token needs, routing counted: 2 A, and the routers asked."""
    return 2 * active_units(spec) + separate_routers(spec)


def init_ffn(
    key, spec: FFNSpec, width: int, *, w_in_scale=1.0, w_out_scale=1.0, param_dtype=jnp.float32
) -> dict:
    """Initial weights of any layer, those that nothing trains among them (see `split_params`).

    std(w_in) = w_in_scale / sqrt(E),   std(w_out) = w_out_scale / sqrt(A)

    Args:
      key: random key.
      spec: the layer.
      width: E, of tokens.
      w_in_scale: of the standard deviation of w_in.
      w_out_scale: the same of w_out.
      param_dtype: of what is trained.
    """
    inits = {DenseSpec: dense.init_params, LeafSpec: leaf.init_params}
    init = inits.get(type(spec), path.init_params)
    return init(key, spec, width, w_in_scale=w_in_scale, w_out_scale=w_out_scale, param_dtype=param_dtype)


def split_params(params: dict) -> tuple[dict, dict]:
    """A layer's arrays as what is trained, and what no optimizer or gradient may see, integers among them.

    Args:
      params: as `init_ffn` or a layer's `init_params` gives them.

    Example:
      >>> spec = LeafSpec(n_experts=8, expert_width=2, top_k=1, router="hash", gate_norm="none")
      >>> trained, fixed = split_params(init_ffn(jax.random.key(0), spec, width=4))
      >>> sorted(trained), sorted(fixed)
      (['b_in', 'b_out', 'w_in', 'w_out'], ['salt'])
      >>> x_TE, ids_T = jnp.ones((3, 4)), jnp.arange(3, dtype=jnp.int32)
      >>> loss = lambda trained: apply_ffn(trained | fixed, x_TE, spec, token_T=ids_T)[0].sum()
      >>> sorted(jax.jit(jax.grad(loss))(trained))
      ['b_in', 'b_out', 'w_in', 'w_out']
    """
    fixed = {name: params[name] for name in params if name in ROUTING_NAMES}
    return {name: params[name] for name in params if name not in fixed}, fixed


def apply_ffn(
    params: dict, x_TE: jax.Array, spec: FFNSpec, implementation: str | None = None, token_T=None, leak=None
):  # fmt: skip
    """(y_TE, Info) of any layer; a leaf layer alone reads the `leak` of a dense start and the ids token_T.

    Args:
      params: the layer's arrays, those of `ROUTING_NAMES` among them.
      x_TE: tokens.
      spec: the layer.
      implementation: of layers that route; None: chosen by rule.
      token_T: int32 ids, which router `hash` reads; None elsewhere.
      leak: float32 scalar, what experts that are not chosen add in a dense start; None: nothing.
    """
    if isinstance(spec, DenseSpec):
        return dense.dense_ffn(params, x_TE, spec)
    if isinstance(spec, LeafSpec):
        return leaf.leaf_ffn(params, x_TE, spec, implementation, token_T, leak)
    return sharded_tree_ffn(params, x_TE, spec, implementation)


def update_routing(spec: FFNSpec, routing: dict, info: Info) -> dict:
    """What balancing makes of a layer's `routing` collection after a step.

    Trees: threshold += rate * sign(visits right - left). Leaf layers: `leaf.balance_update`.
    Everything else is returned as it is.

    Args:
      spec: the layer.
      routing: its collection, e.g. {"threshold": [P, N]}; or that of a run of
        layers, each leaf with one more leading axis.
      info: what the forward pass reported; stacked alike.

    Returns:
      the new collection.
    """
    if not balances(spec):
        return routing
    return balanced(spec, routing, visit_counts(info.leaf_TP, *count_shape(spec)))


def balances(spec: FFNSpec) -> bool:
    """Whether `update_routing` changes anything."""
    return not isinstance(spec, DenseSpec) and spec.balance_rate > 0


def count_shape(spec: TreeSpec | LeafSpec) -> tuple[int, int]:
    """Of the visits of a layer: trees and leaves, or 1 and experts."""
    return (spec.shape.n_trees, spec.shape.n_leaves) if isinstance(spec, TreeSpec) else (1, spec.n_experts)


def balanced(spec: TreeSpec | LeafSpec, routing: dict, counts: jax.Array) -> dict:
    """`update_routing` by visits.

    Args:
      spec: a layer that `balances`.
      routing: as of `update_routing`.
      counts: int32 [P, J], of `usage.visit_counts`; stacked as `routing` is.
    """
    name, rule = ("threshold", path) if isinstance(spec, TreeSpec) else ("selection_bias", leaf)
    update = lambda routing, counts_PJ: rule.balance_update(routing, counts_PJ, spec)
    update = jax.vmap(update) if counts.ndim == 3 else update
    return {**routing, name: update(routing, counts)}


def blend(
    beside: dict, x_TE: jax.Array, y_TE: jax.Array, spec: FFNSpec, n_rows: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The output of a layer that takes over from a dense one, and how far the two are apart.

        y <- (1 - share) y + share d,   gap = mean over rows of mean((y - d)^2) / mean(d^2)

    with d the dense layer's output, and the inner means over the tokens of a row of text.

    Args:
      beside: the dense layer's {w_in, b_in, w_out, b_out}, and share, a scalar from 0 to 1.
      x_TE: inputs of both.
      y_TE: the layer's own output.
      spec: of the layer; the dense one has its activation.
      n_rows: rows of text that the T tokens are.

    Returns:
      the blend in y's dtype, and the gap, a float32 scalar.
    """
    width = beside["b_in"].shape[0]
    d_TE, _ = dense.dense_ffn(beside, x_TE, DenseSpec(width, spec.activation))
    y, d = y_TE.astype(jnp.float32), d_TE.astype(jnp.float32)
    apart_R, size_R = (jnp.square(value).reshape(n_rows, -1).mean(axis=1) for value in (y - d, d))
    gap_R = apart_R / jnp.maximum(jax.lax.stop_gradient(size_R), 1e-12)
    return (y + beside["share"] * (d - y)).astype(y_TE.dtype), gap_R.mean()


class FFN(nn.Module):
    """A feed-forward layer of any kind as a Linen module.

    Trained leaves are in collection "params", all others (thresholds, frozen
    routers, selection biases) in "routing".

    Attributes:
      spec: which layer.
      implementation: a name of `tree.IMPLEMENTATIONS`; None: picked by the number of tokens.
      w_in_scale: w_in starts with std w_in_scale / sqrt(E).
      w_out_scale: w_out starts with std w_out_scale / sqrt(A).
      param_dtype: of the trained leaves.

    Example:
      >>> layer = FFN(LeafSpec(n_experts=8, expert_width=3, top_k=2))
      >>> x = jnp.ones((4, 5, 16))
      >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
      >>> y, info = jax.jit(layer.apply)(variables, x)
      >>> y.shape, info.leaf_TP.shape
      ((4, 5, 16), (20, 2))
    """

    spec: FFNSpec
    implementation: str | None = None
    w_in_scale: float = 1.0
    w_out_scale: float = 1.0
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: jax.Array | None = None, done: jax.Array | float | None = None
    ) -> tuple[jax.Array, Info]:
        """y of x's shape [..., E] and dtype, and Info over the T = prod(...) tokens.

        Args:
          x: what the layer transforms.
          tokens: int32 [...], the ids of the tokens; read where a hash of them decides.
          done: share of the training that is over, a scalar from 0 to 1: give it in every training step of a
            layer with a dense start (`tree_ffn.recipe` has an example), and never elsewhere. Without it
            the layer computes what it does at inference, and cannot be differentiated.

        Raises:
          InputError: `done` is given to a layer without a dense start, or is missing under differentiation
            of a layer with one.
        """
        width, n_rows = x.shape[-1], math.prod(x.shape[:-2])
        if self.is_initializing():
            fresh = init_ffn(
                self.make_rng("params"), self.spec, width, w_in_scale=self.w_in_scale,
                w_out_scale=self.w_out_scale, param_dtype=self.param_dtype,
            )  # fmt: skip
            for collection, arrays in zip(("params", "routing"), split_params(fresh)):
                for name, value in arrays.items():
                    self.put_variable(collection, name, value)
        params = {**self.variables["params"], **self.variables.get("routing", {})}
        # For whoever asks what the units of a layer do (see training/probe.py).
        self.sow("intermediates", "x", x)
        self.sow("intermediates", "tokens", tokens)
        token_T = None if tokens is None else tokens.reshape(-1)
        leak = self.variables.get("leak", {}).get("leak")  # of our own trainer (see training/step.py)
        if done is not None:
            leak = _leak_at(self.spec, done)
        x_TE = x.reshape(-1, width)
        y_TE, info = apply_ffn(params, x_TE, self.spec, self.implementation, token_T, leak)
        if beside := self.variables.get("beside"):  # fine-tuning of converted layers (training/finetune.py)
            y_TE, gap = blend(beside, x_TE, y_TE, self.spec, n_rows)
            self.sow("gap", "ffn", gap)
        return y_TE.reshape(x.shape), info


def _leak_at(spec: FFNSpec, done: jax.Array | float) -> jax.Array:
    if not isinstance(spec, LeafSpec):
        raise InputError(f"done: the layer {spec} has no dense start; leave it out.")
    return spec.leak_at(done)


def build_ffn(spec: FFNSpec, **options) -> FFN:
    """The Linen module of a layer; `options` are the other fields of `FFN`."""
    return FFN(spec, **options)
