"""What the units of trees do on one batch: who learns, who works, which way tokens go.

More than leaf ids tell, and as dear as a training step: for validations only.
"""

import dataclasses
import functools
from typing import TypeGuard

import jax
import jax.numpy as jnp

from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.models.transformer import Transformer
from tree_ffn.training.step import loss_fn
from tree_ffn.tree import PrunedSpec, TreeSpec, path
from tree_ffn.tree.products import pre_activations

# A visited unit below this does no work: GELU is there below -2.5, and tanh near 0.
WORKING = 0.01


def probe(variables: dict, batch: jax.Array, *, model: ModelSpec) -> tuple[dict | None, ...]:
    """Gradients and activations of every unit of the trees, on one batch.

    Args:
      variables: {"params", "routing"} of the model.
      batch: int32 [B, C + 1].
      model: the model.

    Returns:
      one dict a run of layers that are whole trees, None for others:

      - `gradient`: float32 [layers, P, N], the norm over a node's w_in, b_in and
        w_out of the gradient of the batch's mean loss;
      - `peak`: float32 [layers, P, U], the largest |act(z)| of a unit over the
        tokens that visit it; 0 where none does;
      - `working`: float32 [layers, P, U], share of all tokens at which it is above `WORKING`.
    """
    model = dataclasses.replace(model, unroll=1)  # used now and then: a short program, soon compiled
    gradient = jax.grad(loss_fn, has_aux=True)
    grads, _ = gradient(variables["params"], variables["routing"], batch, model, 0.0)
    _, sown = Transformer(model).apply(variables, batch[:, :-1], mutable=["intermediates"])
    found = []
    for i, (ffn, _) in enumerate(model.runs):
        if not can_probe(ffn):
            found.append(None)
            continue
        run = f"run_{i}"
        (x,) = sown["intermediates"][run]["ffn"]["x"]  # [layers, B, C, ...]
        params = {**variables["params"][run]["ffn"], **variables["routing"][run]["ffn"]}
        peak, working = jax.lax.map(functools.partial(_activity, spec=ffn), (params, x))
        gradient_N = jax.vmap(functools.partial(node_norms, spec=ffn))(grads[run]["ffn"])
        found.append({"gradient": gradient_N, "peak": peak, "working": working})
    return tuple(found)


def can_probe(ffn: FFNSpec) -> TypeGuard[TreeSpec]:
    """Whether a layer is of whole trees."""
    return isinstance(ffn, TreeSpec) and not isinstance(ffn, PrunedSpec)


def _activity(layer: tuple[dict, jax.Array], spec: TreeSpec) -> tuple[jax.Array, jax.Array]:
    """Largest |h| of every unit, and the share of tokens at which it works: [P, U] each."""
    params, x_BCE = layer
    x_TE = x_BCE.reshape(-1, x_BCE.shape[-1])
    on_path_TU = spec.unit_gates(params, *path.route(params, x_TE, spec))
    units_TPU = spec.act(pre_activations(x_TE, params["w_in"], params["b_in"]))
    size_TPU = jnp.abs(units_TPU * on_path_TU.reshape(units_TPU.shape))
    return size_TPU.max(axis=0), jnp.mean((size_TPU > WORKING).astype(jnp.float32), axis=0)


def node_norms(grads: dict, spec: TreeSpec) -> jax.Array:
    """Norm of the gradient of every node, over its units and their three kinds of weights: [P, N].

    Args:
      grads: {w_in [P,U,E], b_in [P,U], w_out [P,U,E]} of one layer.
      spec: of the layer.
    """
    square = lambda leaf: jnp.square(leaf.astype(jnp.float32))

    of_units_PU = square(grads["w_in"]).sum(-1) + square(grads["b_in"]) + square(grads["w_out"]).sum(-1)
    starts = spec.shape.level_starts
    levels = [
        of_units_PU[:, start:end].reshape(spec.shape.n_trees, 2**level, -1).sum(axis=-1)
        for level, (start, end) in enumerate(zip(starts, starts[1:]))
    ]
    return jnp.sqrt(jnp.concatenate(levels, axis=1))


def probe_metrics(found: dict) -> dict[str, jax.Array]:
    """A run's probe in a few numbers a layer, each float32 [layers].

    - `working_units`: units that work for a token, mean: at most A.
    - `ever_working`: share of all units of the trees that work for at least one token.
    - `gradient_right`: share of the squared gradient below the roots that is in right children.

    Args:
      found: of `probe`, one run.
    """
    square = jnp.square(found["gradient"])
    right, below = square[..., 2::2].sum(axis=(1, 2)), square[..., 1:].sum(axis=(1, 2))
    return {
        "working_units": found["working"].sum(axis=(1, 2)),
        "ever_working": jnp.mean((found["peak"] > WORKING).astype(jnp.float32), axis=(1, 2)),
        "gradient_right": right / jnp.maximum(below, jnp.finfo(jnp.float32).tiny),
    }
