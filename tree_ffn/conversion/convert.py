"""Dense layers into trees: every unit of the dense layer has a place, and what paths miss is made up for.

    w_in, b_in  are copied; places that are left over hold zeros
    decisions   linear routers fitted to the calibration tokens (see `routers`), kept `separate` from the
                units (router vectors that no optimizer trains, with a threshold each: D more products of E
                numbers a token and tree, counted in FLOPs and not in A), or `spent`: each is the first unit
                of its node; they train like units
    w_out       copied, or solved for by least squares with the routers fitted to what is left (`refit`)
    b_out       plus the mean, over the calibration tokens, of what is missed

How much of the dense output y is kept, on tokens that nothing was fitted to:

    kept = 1 - sum_t ||y_tree - y||^2 / sum_t ||y - mean(y)||^2
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.conversion.fit_routers import fit_tree, path_energies, put_routers
from tree_ffn.conversion.placement import check_room, place
from tree_ffn.conversion.refit import best_leaves, output_at, refit, run_trees, solve_outputs
from tree_ffn.errors import InputError, check_choice
from tree_ffn.models.dense import DenseSpec
from tree_ffn.models.layer_stacks import split_layers, stack_layers
from tree_ffn.models.spec import ModelSpec, kind_of
from tree_ffn.tree import TreeShape, TreeSpec, activation

ROUTERS = ("separate", "spent")
# Least calibration tokens for each leaf of a tree.
TOKENS_PER_LEAF = 32


class Recipe(NamedTuple):
    """How layers are converted.

    Attributes:
      shape: of the trees.
      method: of `placement.METHODS`.
      router: of `ROUTERS`.
      seed: of random choices.
      refits: how often w_out is solved for (see `refit`); with 0 a visited unit is the dense unit.
      drop: leave out units that find no place.
    """

    shape: TreeShape
    method: str
    router: str = "separate"
    seed: int = 0
    refits: int = 3
    drop: bool = False

    @property
    def spent(self) -> bool:
        """Whether routers take the place of units."""
        return self.router == "spent"


class Kept(NamedTuple):
    """Shares of a dense layer's output, on held-out tokens: at most 1, 0 is what its mean alone gives.

    References are fitted to the calibration tokens as the trees are: b_out, and with refits w_out.

    Attributes:
      tree: the layer of trees.
      paths: its units and weights, with the paths that leave the least error, known beforehand: what is
        missing from `tree` is lost by routers, the rest by places.
      oracle: the A units of every token that add most, |act(z)| ||w_out||, known beforehand.
      static: the A units that add most on the calibration tokens.
    """

    tree: float
    paths: float
    oracle: float
    static: float


def tree_spec(dense: DenseSpec, recipe: Recipe) -> TreeSpec:
    """The layer that a dense one becomes; its forward pass is that of hard routing.

    Spent routers go on learning (`straight_through`), separate ones cannot.
    """
    check_choice("router", recipe.router, ROUTERS)
    how = {"routing": "straight_through"} if recipe.spent else {"routing": "hard", "router": "frozen"}
    return TreeSpec(recipe.shape, dense.activation, **how)


def check_convertible(model: ModelSpec, recipe: Recipe) -> None:
    """Raises InputError unless the layers are dense, and the shape has room for each or may drop units."""
    for layer, ffn in enumerate(model.ffns):
        if not isinstance(ffn, DenseSpec):
            raise InputError(
                f"model: layer {layer} is not dense (ffn.kind {kind_of(ffn)!r}); only dense layers are "
                "converted."
            )
        tree_spec(ffn, recipe)
        if not recipe.drop:
            check_room(recipe.shape, ffn.width, recipe.spent)


def tokens_needed(shape: TreeShape) -> int:
    """Calibration tokens without which a layer of this shape is not fitted: 32 * 2^D."""
    return TOKENS_PER_LEAF * shape.n_leaves


def units_at_work(params: dict, spec: DenseSpec, x_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the units of a dense layer do: act(z) and energies, float32 [F, T] each.

    e[f, t] = act(z[f, t])^2 ||w_out[f]||^2
    """
    act = activation(spec.activation)
    z_FT = params["w_in"] @ x_TE.T + params["b_in"][:, None]
    h_FT = np.array(act(jnp.asarray(z_FT)))
    return h_FT, h_FT**2 * np.square(params["w_out"]).sum(axis=1)[:, None]


def tree_params(dense: dict, unit_PU: np.ndarray, spec: TreeSpec) -> dict:
    """The arrays of the layer of trees with zeros for routers, as `tree.init_params` names them.

    Args:
      dense: {w_in [F,E], b_in [F], w_out [F,E], b_out [E]}.
      unit_PU: where its units stand (see `placement.place`).
      spec: of the layer of trees.
    """
    shape, names = spec.shape, ("w_in", "b_in", "w_out")
    padded = {name: np.concatenate([dense[name], np.zeros_like(dense[name][:1])]) for name in names}
    params = {name: padded[name][unit_PU] for name in names}
    params |= {"b_out": dense["b_out"], "threshold": np.zeros((shape.n_trees, shape.n_nodes), np.float32)}
    if spec.router == "frozen":
        w_PRE = np.zeros((shape.n_trees, shape.n_deciding, dense["w_in"].shape[1]), np.float32)
        params["router"] = {"w": w_PRE}
    return params


def convert_layer(
    dense: dict, spec: DenseSpec, x_TE: np.ndarray, held_TE: np.ndarray, recipe: Recipe
) -> tuple[dict, Kept]:
    """The layer of trees that a dense layer becomes, and what it keeps.

    Args:
      dense: arrays of the dense layer, float32.
      spec: of the dense layer.
      x_TE: inputs of the layer for the calibration tokens.
      held_TE: the same for held-out tokens.
      recipe: how.

    Returns:
      params of `tree_spec(spec, recipe)`, and `Kept`.

    Raises:
      InputError: the recipe does not fit, or there are too few tokens.
    """
    shape, trees = recipe.shape, tree_spec(spec, recipe)
    h_FT, energy_FT = units_at_work(dense, spec, x_TE)
    y_TE = h_FT.T @ dense["w_out"] + dense["b_out"]
    unit_PU = place(recipe.method, shape, x_TE, energy_FT, recipe.spent, recipe.seed, recipe.drop)
    params = tree_params(dense, unit_PU, trees)
    for tree, unit_U in enumerate(unit_PU):
        found = fit_tree(x_TE, path_energies(energy_FT, unit_U, shape), shape)
        params = put_routers(params, trees, *found, tree)
    params["b_out"] = params["b_out"] + (y_TE - run_trees(params, trees, x_TE)[0]).mean(axis=0)
    params = refit(params, trees, x_TE, y_TE, recipe.refits)

    held_FT, held_energy_FT = units_at_work(dense, spec, held_TE)
    held_y_TE = held_FT.T @ dense["w_out"] + dense["b_out"]

    def reference(mask_FT, held_mask_FT):
        """A selection of units, fitted as the trees are: w_out and b_out, or b_out alone."""
        h_TF, held_TF, w_FE = (h_FT * mask_FT).T, (held_FT * held_mask_FT).T, dense["w_out"]
        if recipe.refits:
            w_FE, b_E = solve_outputs(h_TF, y_TE, w_FE)
        else:
            b_E = (y_TE - h_TF @ w_FE).mean(axis=0)
        return kept(held_TF @ w_FE + b_E, held_y_TE)

    n = min(shape.active_units, spec.width)
    static_F1 = largest(energy_FT.sum(axis=1, keepdims=True), n)
    best_TP = best_leaves(params, trees, held_TE, held_y_TE)
    return params, Kept(
        kept(run_trees(params, trees, held_TE)[0], held_y_TE),
        kept(output_at(params, trees, held_TE, best_TP), held_y_TE),
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
    """A model whose dense layers have become trees.

    Args:
      model, variables: the dense model.
      inputs: x_TE of every layer's feed-forward part for calibration tokens (see `calibration`).
      held_out: the same for held-out tokens.
      recipe: how; every layer gets the same shape.

    Returns:
      spec, variables (NumPy arrays), and what every layer keeps.

    Raises:
      InputError: a layer is not dense, the shape has no room for it, an unknown method or router.
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
        routing = {name: params.pop(name) for name in ("threshold", "router") if name in params}
        layer["params"]["ffn"] = jax.tree.map(lambda a, stored=stored: np.asarray(a).astype(stored), params)
        layer["routing"] = {"ffn": routing}
        ffns.append(tree_spec(spec, recipe))
        found.append(shares)
    model, variables = stack_layers(model, variables, ffns, layers)
    return model, variables, found
