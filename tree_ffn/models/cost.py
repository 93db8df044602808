"""What a model costs, by shapes and arithmetic: nothing is allocated, whatever its size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.ffn import (
    active_share,
    active_units,
    ffn_flops,
    products,
    separate_routers,
    total_units,
)
from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.models.transformer import Transformer
from tree_ffn.tree import LeafSpec, PrunedSpec


def abstract_variables(spec: ModelSpec) -> dict:
    """Shapes and dtypes of a model's variables."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(_initialiser(spec), jax.random.key(0), tokens)


@functools.lru_cache(maxsize=32)
def _initialiser(spec: ModelSpec):
    """The same object for the same model: jax traces it once."""
    return Transformer(spec).init


def model_flops(spec: ModelSpec) -> int:
    """Multiply-adds x 2 of the forward pass of one token, at the mean position of a full context.

        layers (8 E^2 + 2 E (context + 1)) + FFNs + 2 E V

    8 E^2 are the attention's projections and 4 E (context + 1) / 2 its scores
    and weighted sums over the positions before; norms and activations are left
    out. Training costs about three times as much.
    """
    attention = 8 * spec.width**2 + 2 * spec.width * (spec.max_seq_len + 1)
    ffns = sum(ffn_flops(ffn, spec.width) for ffn in spec.ffns)
    return spec.n_layers * attention + ffns + 2 * spec.width * spec.vocab_size


def dense_counterpart(spec: ModelSpec) -> ModelSpec:
    """The same model with a dense layer of F units in the place of every other kind."""
    return dataclasses.replace(spec, ffns=tuple(DenseSpec(total_units(ffn)) for ffn in spec.ffns))


def sizes(spec: ModelSpec) -> dict:
    """Sizes and costs of a model as numbers.

    Returns:
      parameters (trained), parameters_ffn, parameters_embeddings,
      parameters_routing (not trained); units and active_units (of all layers'
      FFNs), active_share; flops_ffn, flops_model (a token's forward pass) and
      the dense counterparts flops_ffn_dense, flops_model_dense; bytes_weights,
      bytes_training (weights, gradients and two moments), bytes_cache (keys and
      values of one full context).
    """
    variables = abstract_variables(spec)
    params, routing = variables["params"], variables.get("routing", {})
    in_ffns = [run["ffn"] for name, run in params.items() if name.startswith("run_")]
    total, active = (sum(map(count, spec.ffns)) for count in (total_units, active_units))
    weights = _bytes(params)
    return {
        "parameters": _count(params),
        "parameters_ffn": _count(in_ffns),
        "parameters_embeddings": _count(params["embed"]),
        "parameters_routing": _count(routing),
        "units": total,
        "active_units": active,
        "active_share": active / total,
        **products_metrics(spec),
        "flops_ffn": sum(ffn_flops(ffn, spec.width) for ffn in spec.ffns),
        "flops_ffn_dense": sum(4 * total_units(ffn) * spec.width for ffn in spec.ffns),
        "flops_model": model_flops(spec),
        "flops_model_dense": model_flops(dense_counterpart(spec)),
        "bytes_weights": weights + _bytes(routing),
        "bytes_training": 4 * weights + _bytes(routing),
        "bytes_cache": 2 * spec.n_layers * spec.max_seq_len * spec.width * jnp.dtype(spec.dtype).itemsize,
    }


def products_metrics(spec: ModelSpec) -> dict[str, float]:
    """`products`, dot products of E numbers that a token needs in a layer, routing counted; `products_share`.

    The mean over the layers; the share is of the 2 F of a dense layer of F = 4 E units, whatever is stored.
    """
    mean = sum(map(products, spec.ffns)) / spec.n_layers
    return {"products": mean, "products_share": mean / (8 * spec.width)}


def describe(spec: ModelSpec) -> tuple[str, dict]:
    """A page about a model, and its `sizes`.

    Example:
      >>> ffn = LeafSpec(n_experts=32, expert_width=16, top_k=1, gate_norm="none")
      >>> spec = ModelSpec(vocab_size=257, max_seq_len=128, width=128, n_layers=1, n_heads=2, ffns=(ffn,))
      >>> page, numbers = describe(spec)
      >>> numbers["active_share"]
      0.03125
    """
    n = sizes(spec)
    layers = [f"  {length} x {_layer_line(ffn)}" for ffn, length in spec.runs]
    rows = [
        ("parameters", _si(n["parameters"]), f"{n['parameters']:,}"),
        ("  feed-forward", _si(n["parameters_ffn"]), _share(n["parameters_ffn"], n["parameters"])),
        (
            "  embeddings",
            _si(n["parameters_embeddings"]),
            _share(n["parameters_embeddings"], n["parameters"]),
        ),
        (
            "  not trained",
            _si(n["parameters_routing"]),
            "thresholds, frozen routers, selection biases, pruned structure",
        ),
        (
            "active units",
            f"{n['active_units']:,}",
            f"{_share(n['active_units'], n['units'])} of {n['units']:,}",
        ),
        (
            "products a layer",
            f"{n['products']:,.0f}",
            f"routing counted: {100 * n['products_share']:.2f} % of a dense layer of 4 E units",
        ),
        ("FLOPs a token, FFNs", _si(n["flops_ffn"]), _against(n["flops_ffn"], n["flops_ffn_dense"])),
        ("FLOPs a token, model", _si(n["flops_model"]), _against(n["flops_model"], n["flops_model_dense"])),
        ("bytes, weights", _si(n["bytes_weights"]), f"stored as {spec.param_dtype}"),
        ("bytes, training", _si(n["bytes_training"]), "weights, gradients, two moments; no activations"),
        (
            "bytes, KV cache",
            _si(n["bytes_cache"]),
            f"one sequence of {spec.max_seq_len:,} tokens, {spec.dtype}",
        ),
    ]
    head = (
        f"decoder: {spec.n_layers} layers, {spec.width} wide, {spec.n_heads} heads of {spec.head_width}, "
        f"context {spec.max_seq_len:,}, {spec.vocab_size:,} tokens; computes in {spec.dtype}"
    )
    table = [f"{name:<22}{value:>10}   {note}" for name, value, note in rows]
    note = "FLOPs: multiply-adds x 2, forward, over active units; `masked` spends them on all."
    return "\n".join([head, *layers, "", *table, "", note]), n


def _layer_line(ffn: FFNSpec) -> str:
    sizes = (
        f"F {total_units(ffn):,}, A {active_units(ffn):,} ({100 * active_share(ffn):.2f} %), {ffn.activation}"
    )
    if isinstance(ffn, DenseSpec):
        return f"dense: {sizes}"
    if isinstance(ffn, LeafSpec):
        trees = f" of {ffn.n_trees}" if ffn.router == "tree" else ""
        kind, kept = ("pruned leaf", f"{ffn.n_kept} of ") if ffn.n_kept else ("leaf", "")
        start = f", a dense start of {ffn.dense_start:.0%}" if ffn.dense_start else ""
        return (
            f"{kind}: {kept}{ffn.n_experts} experts of {ffn.expert_width}, top {ffn.top_k}, "
            f"router {ffn.router}{trees}, gates {ffn.gate_norm}{start}: {sizes}"
        )
    shape, kind = ffn.shape, "tree"
    tree = f"P {shape.n_trees}, D {shape.depth}, W {shape.node_width}"
    if isinstance(ffn, PrunedSpec):
        kind, tree = "pruned tree", f"{tree}, {ffn.nodes[-1]:,} of {shape.n_trees * shape.n_leaves:,} leaves"
    if ffn.router == "frozen":
        asked = f"{separate_routers(ffn)} products a token are not counted in A"
        return f"{kind}: {tree}: {sizes}, frozen separate routers, whose {asked}"
    return f"{kind}: {tree}: {sizes}, {ffn.routing} routing"


def _count(shapes) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _bytes(shapes) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _si(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %"


def _against(value: float, dense: float) -> str:
    return f"{_share(value, dense)} of dense ({_si(dense)}), {dense / value:.1f}x fewer"
