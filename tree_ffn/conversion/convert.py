"""Dense layers into sparse ones: each unit has a place in them, and what is not visited is made up for.

    w_in, b_in  are copied; places that are left over hold zeros
    routers     are fitted to the calibration tokens (see `fit_routers`): of a leaf layer its own, which go on
                learning; of a path layer `separate` from the units (vectors that no optimizer trains, with a
                threshold each: D more products of E numbers a token and tree, counted in FLOPs and not in
                A), or `spent`: each is the first unit of its node, and trains like units
    w_out       copied, or solved for by least squares with the routers fitted to what is left (`refit`)
    b_out       plus the mean, over the calibration tokens, of what is missed

How much of the dense output y is kept, on tokens that nothing was fitted to:

    kept = 1 - sum_t ||y_sparse - y||^2 / sum_t ||y - mean(y)||^2
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.conversion.placement import check_room, place
from tree_ffn.conversion.refit import best_experts, output_at, refit, size_of, solve_outputs
from tree_ffn.conversion.targets import UNIT_ARRAYS, Target, empty_layer, output, routed, target_of
from tree_ffn.errors import InputError, check_choice
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.ffn import split_params
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.models.spec import ModelSpec, kind_of
from tree_ffn.tree import LeafSpec, TreeShape, TreeSpec, activation

# Of a path layer: where its decisions are kept.
ROUTERS = ("separate", "spent")


class Recipe(NamedTuple):
    """How layers are converted.

    Attributes:
      layer: what they become, but for its activation, which is the dense layer's, and a dense start.
      method: of `placement.METHODS`.
      seed: of random choices.
      refits: how often w_out is solved for, at most (see `refit`); with 0 a visited unit is the dense unit.
      drop: leave out units that find no place.
    """

    layer: LeafSpec | TreeSpec
    method: str
    seed: int = 0
    refits: int = 3
    drop: bool = False


class Kept(NamedTuple):
    """Shares of a dense layer's output, on held-out tokens: at most 1, 0 is what its mean alone gives.

    References are fitted to the calibration tokens as the layer is: b_out, and with refits w_out.

    Attributes:
      layer: the sparse layer.
      experts: its units and weights, with the paths, or K experts, that leave the least error, known
        beforehand: what is missing from `layer` is lost by routers, the rest by places.
      oracle: the A units of every token that add most, |act(z)| ||w_out||, known beforehand.
      static: the A units that add most on the calibration tokens.
    """

    layer: float
    experts: float
    oracle: float
    static: float


def path_layer(shape: TreeShape, router: str = "separate") -> TreeSpec:
    """A path layer to convert into, with its routers where `ROUTERS` says.

    Spent routers go on learning (`straight_through`), separate ones cannot.
    """
    check_choice("router", router, ROUTERS)
    how = {"routing": "straight_through"} if router == "spent" else {"router": "frozen"}
    how = how if shape.depth else {}  # where nothing is decided
    return TreeSpec(shape, **how)


def layer_for(dense: DenseSpec, recipe: Recipe) -> LeafSpec | TreeSpec:
    """The layer that a dense one becomes."""
    layer = recipe.layer.after_start if isinstance(recipe.layer, LeafSpec) else recipe.layer
    return dataclasses.replace(layer, activation=dense.activation)


def check_convertible(model: ModelSpec, recipe: Recipe) -> None:
    """Raises InputError unless the layers are dense, and there is room for each or units may be dropped."""
    target = target_of(recipe.layer)
    for layer, ffn in enumerate(model.ffns):
        if not isinstance(ffn, DenseSpec):
            raise InputError(
                f"model: layer {layer} is not dense (ffn.kind {kind_of(ffn)!r}); only dense layers are "
                "converted."
            )
        if not recipe.drop:
            check_room(target, ffn.width)


def tokens_needed(layer: LeafSpec | TreeSpec) -> int:
    """Calibration tokens without which a layer is not fitted: 32 for each of its leaves that a token visits.

    Example:
      >>> tokens_needed(LeafSpec(n_experts=512, expert_width=1, top_k=16))
      1024
    """
    return target_of(layer).tokens_needed


def units_at_work(params: dict, spec: DenseSpec, x_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the units of a dense layer do: act(z) and energies, float32 [F, T] each.

    e[f, t] = act(z[f, t])^2 ||w_out[f]||^2

    Args:
      params: of the dense layer: {w_in [F, E], b_in [F], w_out [F, E], ...}.
      spec: the dense layer.
      x_TE: its inputs on the calibration text.
    """
    act = activation(spec.activation)
    z_FT = params["w_in"] @ x_TE.T + params["b_in"][:, None]
    h_FT = np.array(act(jnp.asarray(z_FT)))
    return h_FT, h_FT**2 * np.square(params["w_out"]).sum(axis=1)[:, None]


def first_layer(target: Target, dense: dict, x_TE, y_TE, energy_FT, recipe: Recipe) -> dict:
    """The layer before any refit: units at their places, and routers fitted to their energies.

    Where gates of chosen experts are not about 1, w_out makes up for their size.

    Args:
      target: the layer to make.
      dense: arrays of the dense layer.
      x_TE: inputs on the calibration text.
      y_TE: the dense layer's outputs for them.
      energy_FT: of `units_at_work`.
      recipe: how units find their places.
    """
    unit_I = place(recipe.method, target, x_TE, energy_FT, recipe.seed, recipe.drop)
    params = empty_layer(target.spec, x_TE.shape[1]) | {"b_out": dense["b_out"]}
    for name in UNIT_ARRAYS:
        padded = np.concatenate([dense[name], np.zeros_like(dense[name][:1])])
        params[name] = padded[unit_I].reshape(params[name].shape)
    energy_IT = np.where(unit_I[:, None] < 0, 0, energy_FT[unit_I])
    for group, experts in enumerate(target.groups):
        energy_JT = np.stack([energy_IT[places].sum(axis=0) for places in target.experts[experts]])
        params = target.fitted(params, x_TE, energy_JT, group)
    params["w_out"] = params["w_out"] / size_of(routed(params, target.spec, x_TE)[1])
    params["b_out"] = params["b_out"] + (y_TE - output(params, target.spec, x_TE)).mean(axis=0)
    return params


def convert_layer(
    dense: dict, spec: DenseSpec, x_TE: np.ndarray, held_TE: np.ndarray, recipe: Recipe
) -> tuple[dict, Kept]:
    """The layer that a dense one becomes, and what it keeps.

    Args:
      dense: {w_in [F,E], b_in [F], w_out [F,E], b_out [E]} of the dense layer, float32.
      spec: of the dense layer.
      x_TE: inputs of the layer for the calibration tokens.
      held_TE: the same for held-out tokens.
      recipe: how.

    Returns:
      params of `layer_for(spec, recipe)`, and `Kept`.

    Raises:
      InputError: the recipe does not fit.
    """
    target = target_of(layer_for(spec, recipe))
    h_FT, energy_FT = units_at_work(dense, spec, x_TE)
    y_TE = h_FT.T @ dense["w_out"] + dense["b_out"]
    params = first_layer(target, dense, x_TE, y_TE, energy_FT, recipe)
    params = refit(target, params, x_TE, y_TE, recipe.refits)

    held_FT, held_energy_FT = units_at_work(dense, spec, held_TE)
    held_y_TE = held_FT.T @ dense["w_out"] + dense["b_out"]

    def reference(mask_FT, held_mask_FT):
        """A selection of units, fitted as the layer is: w_out and b_out, or b_out alone."""
        h_TF, held_TF, w_FE = (h_FT * mask_FT).T, (held_FT * held_mask_FT).T, dense["w_out"]
        if recipe.refits:
            w_FE, b_E = solve_outputs(h_TF, y_TE, w_FE)
        else:
            b_E = (y_TE - h_TF @ w_FE).mean(axis=0)
        return kept(held_TF @ w_FE + b_E, held_y_TE)

    n = min(target.spec.active_units, spec.width)
    static_F1 = largest(energy_FT.sum(axis=1, keepdims=True), n)
    best_TK = best_experts(target, params, held_TE, held_y_TE)
    return params, Kept(
        kept(output(params, target.spec, held_TE), held_y_TE),
        kept(output_at(target, params, held_TE, best_TK), held_y_TE),
        reference(largest(energy_FT, n), largest(held_energy_FT, n)),
        reference(static_F1, static_F1),
    )


def largest(value_FT: np.ndarray, n: int) -> np.ndarray:
    """bool, True at the n largest of every column.

    Example:
      >>> largest(np.array([[3.0], [1.0], [2.0]]), 2)[:, 0].tolist()
      [True, False, True]
    """
    mask_FT = np.zeros(value_FT.shape, bool)
    first_nT = np.argpartition(-value_FT, n - 1, axis=0)[:n]
    np.put_along_axis(mask_FT, first_nT, True, axis=0)
    return mask_FT


def kept(y_TE: np.ndarray, dense_TE: np.ndarray) -> float:
    """1 - sum ||y - dense||^2 / sum ||dense - mean(dense)||^2."""
    spread = np.square(dense_TE - dense_TE.mean(axis=0), dtype=np.float64).sum()
    return float(1 - np.square(y_TE - dense_TE, dtype=np.float64).sum() / max(spread, 1e-30))


def convert_model(
    model: ModelSpec,
    variables: dict,
    inputs: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    recipe: Recipe,
) -> tuple[ModelSpec, dict, list[Kept]]:
    """A model whose dense layers have become sparse.

    Args:
      model: the dense model.
      variables: its {"params", "routing"}.
      inputs: x_TE of every layer's feed-forward part for calibration tokens (see `calibration`).
      held_out: the same for held-out tokens.
      recipe: how; every layer becomes the same.

    Returns:
      spec, variables (NumPy arrays), and what every layer keeps.

    Raises:
      InputError: a layer is not dense, there is no room for it, an unknown method.
    """
    check_convertible(model, recipe)
    variables = jax.tree.map(np.asarray, jax.device_get(variables))
    layers, found, ffns = split_layers(model, variables), [], []

    def one(layer, spec, x_TE, held_TE):
        dense = {name: np.asarray(a, np.float32) for name, a in layer["params"]["ffn"].items()}
        return convert_layer(dense, spec, x_TE, held_TE, recipe)

    # Layers have nothing to do with each other, and one keeps few cores busy.
    with ThreadPoolExecutor(max(1, min(len(layers), (os.cpu_count() or 1) // 2))) as threads:
        converted = list(threads.map(one, layers, model.ffns, inputs, held_out))
    for layer, spec, (params, shares) in zip(layers, model.ffns, converted, strict=True):
        assert isinstance(spec, DenseSpec)
        stored = layer["params"]["ffn"]["w_in"].dtype
        trained, routing = split_params(params)
        layer["params"]["ffn"] = jax.tree.map(lambda a, stored=stored: np.asarray(a).astype(stored), trained)
        layer |= {"routing": {"ffn": routing}} if routing else {}
        ffns.append(layer_for(spec, recipe))
        found.append(shares)
    model, variables = stack_layers(model, variables, ffns, layers)
    return model, variables, found
