"""The layers that dense layers become, as conversion sees them: places for units, and experts made of them.

A path layer's experts are the paths of its trees, of which a token has one a tree; a leaf layer's are the
leaves, of which it has K. What a place adds counts by its gate, 0 where no expert of the token has it:

    y = b_out + sum_i gate[t, i] act(z[t, i]) w_out[i]

Places number the units of a layer in the order of its arrays, all trees together: I of them.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.conversion.fit_routers import fit_beam, fit_tree
from tree_ffn.errors import InputError
from tree_ffn.models.ffn import init_ffn
from tree_ffn.tree import LeafSpec, PrunedSpec, TreeShape, TreeSpec, leaf, leaf_ffn, path, tree_ffn
from tree_ffn.tree.shape import path_of

# Least calibration tokens that visit a leaf, on average.
VISITS_PER_LEAF = 32
# Logits of experts' routers are those of fitted probabilities times this: the nearer to 0, the more alike are
# the gates of the chosen, and a dense layer adds all its units at one weight. Of .05, .2, .5, 1 it kept most.
TEMPER = 0.2
UNIT_ARRAYS = ("w_in", "b_in", "w_out")


class Target(Protocol):
    """A layer to be.

    Attributes:
      nodes: of every tree, in heap order, the places that a node has for units.
      experts: int [X, n], the places of every expert.
      groups: the experts whose routers are fitted together.
      one_each: a token has one expert of each group, so that another one takes its place.
      tokens_needed: least number of calibration tokens.
      size: in words.
    """

    nodes: list[list[np.ndarray]]
    experts: np.ndarray
    groups: list[slice]
    one_each: bool
    tokens_needed: int
    size: str

    @property
    def spec(self) -> LeafSpec | TreeSpec:
        """The layer."""
        ...

    def fitted(self, params: dict, x_TE: np.ndarray, value_JT: np.ndarray, group: int) -> dict:
        """The layer with the routers of a group fitted to the values of its experts.

        Args:
          params: arrays of the layer, which stay as they are.
          x_TE: inputs on the calibration text.
          value_JT: of each of the group's J experts for every token.
          group: which of `groups`.
        """
        ...


def target_of(spec: LeafSpec | TreeSpec) -> Target:
    """How conversion sees a layer.

    Raises:
      InputError: dense layers cannot become this one.

    Example:
      >>> target_of(LeafSpec(n_experts=4, expert_width=2, top_k=2)).experts.tolist()
      [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    if isinstance(spec, LeafSpec):
        return Leaves(spec)
    return Paths(spec)


class Paths:
    """A path layer: paths of a tree share the units above where they part."""

    one_each = True

    def __init__(self, spec: TreeSpec):
        if isinstance(spec, PrunedSpec) or spec.act_site != "node":
            raise InputError(
                f"act_site: {spec.act_site!r} of a {type(spec).__name__} is not allowed; dense layers become "
                "whole trees with the activation at the nodes."
            )
        self.spec, shape = spec, spec.shape
        spent = spec.router == "first_unit"
        starts = [tree * shape.tree_units for tree in range(shape.n_trees)]
        routers = shape.router_units if spent else ()
        free = [np.setdiff1d(shape.node_units(node), routers).astype(int) for node in range(shape.n_nodes)]
        self.nodes = [[start + places for places in free] for start in starts]
        self.experts = np.concatenate([start + path_units(shape) for start in starts])
        self.groups = [slice(p * shape.n_leaves, (p + 1) * shape.n_leaves) for p in range(shape.n_trees)]
        self.tokens_needed = VISITS_PER_LEAF * shape.n_leaves
        lost = f" ({shape.n_trees * shape.n_deciding:,} units of them are spent on routers)" if spent else ""
        self.size = f"{shape.n_trees} trees of depth {shape.depth} and node_width {shape.node_width}{lost}"

    def fitted(self, params: dict, x_TE: np.ndarray, value_JT: np.ndarray, group: int) -> dict:
        """Routers of one tree: separate ones, or in the place of first units (w_out = 0)."""
        w_RE, threshold_R = fit_tree(x_TE, value_JT)
        if self.spec.router == "frozen":
            w_PRE, threshold_PN = params["router"]["w"].copy(), params["threshold"].copy()
            w_PRE[group], threshold_PN[group, : len(threshold_R)] = w_RE, threshold_R
            return params | {"router": {"w": w_PRE}, "threshold": threshold_PN}
        first, params = (
            list(self.spec.shape.router_units),
            params | {n: params[n].copy() for n in UNIT_ARRAYS},
        )
        params["w_in"][group, first], params["b_in"][group, first] = w_RE, -threshold_R
        params["w_out"][group, first] = 0
        return params


class Leaves:
    """A leaf layer: its experts share nothing, and their routers are fitted together."""

    def __init__(self, spec: LeafSpec):
        if (spec.router, spec.n_kept) != ("tree", 0):
            raise InputError(
                f"router: {spec.router!r} with n_kept {spec.n_kept} is not allowed; dense layers become "
                "leaves of whole trees: use 'tree' and 0."
            )
        self.spec, n_leaves = spec, spec.n_experts // spec.n_trees
        self.experts = np.arange(spec.n_experts * spec.expert_width).reshape(spec.n_experts, -1)
        above = [np.arange(0)] * (n_leaves - 1)
        self.nodes = [[*above, *leaves] for leaves in self.experts.reshape(spec.n_trees, n_leaves, -1)]
        self.groups = [slice(0, spec.n_experts)]
        self.one_each = spec.top_k == 1
        self.tokens_needed = -(-VISITS_PER_LEAF * spec.n_experts // spec.top_k)
        self.size = f"{spec.n_experts} experts of expert_width {spec.expert_width}"

    def fitted(self, params: dict, x_TE: np.ndarray, value_JT: np.ndarray, group: int) -> dict:
        """All routers; where every expert is chosen they decide nothing and stay 0, so gates are equal."""
        spec = self.spec
        if spec.top_k == spec.n_experts:
            return params
        w_RE, b_R = fit_beam(x_TE, value_JT, spec.n_trees, spec.top_k)
        return params | {"w_router": TEMPER * w_RE, "b_router": TEMPER * b_R}


def path_units(shape: TreeShape) -> np.ndarray:
    """The units of a tree that every path visits: int64 [J, sum_l W_l], J = 2^D.

    Example:
      >>> path_units(TreeShape(n_trees=1, depth=1, node_width=(1, 2))).tolist()
      [[0, 1, 2], [0, 3, 4]]
    """
    paths = (path_of(leaf, shape.depth) for leaf in range(shape.n_leaves))
    return np.array([[u for node in path for u in shape.node_units(node)] for path in paths])


def empty_layer(spec: LeafSpec | TreeSpec, width: int) -> dict:
    """Arrays of a layer of model width E, all of them zeros, as `init_ffn` names them."""
    shapes = jax.eval_shape(lambda: init_ffn(jax.random.key(0), spec, width))
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)


def place_outputs(params: dict, spec: LeafSpec | TreeSpec, x_TE: np.ndarray) -> np.ndarray:
    """act(z) of every place, whatever its gate: float32 [T, I].

    Args:
      params: arrays of the layer.
      spec: the layer.
      x_TE: inputs.
    """
    z_TI = x_TE @ joined(params, "w_in").T + joined(params, "b_in")
    return np.array(spec.act(z_TI))


def joined(params: dict, name: str) -> np.ndarray:
    """w_in, b_in or w_out of all places: [I, ...]."""
    return params[name].reshape(-1, *params[name].shape[2:])


def routed(params: dict, spec: LeafSpec | TreeSpec, x_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates that the layer itself chooses: ids_TK int32, gates_TK float32.

    Args:
      params: arrays of the layer.
      spec: the layer.
      x_TE: inputs.
    """
    ids_TK, gates_TK = _routed(params, x_TE, spec)
    return np.asarray(ids_TK), np.asarray(gates_TK)


@functools.partial(jax.jit, static_argnames=("spec",))
def _routed(params: dict, x_TE, spec):
    return (leaf.route if isinstance(spec, LeafSpec) else path.route)(params, x_TE, spec)


def place_gates(params: dict, spec: LeafSpec | TreeSpec, ids_TK: np.ndarray, gates_TK) -> np.ndarray:
    """Gates of all places for given experts: float32 [T, I].

    Args:
      params: arrays of the layer.
      spec: the layer.
      ids_TK: int32, the experts of every token.
      gates_TK: float32, their gates.
    """
    gate_TX = np.asarray(_unit_gates(params, ids_TK, gates_TK, spec))
    return np.repeat(gate_TX, spec.total_units // gate_TX.shape[1], axis=1)


@functools.partial(jax.jit, static_argnames=("spec",))
def _unit_gates(params: dict, ids_TK, gates_TK, spec):
    return spec.unit_gates(params, ids_TK, jnp.asarray(gates_TK, jnp.float32))


def output(params: dict, spec: LeafSpec | TreeSpec, x_TE: np.ndarray) -> np.ndarray:
    """What the layer itself gives: [T, E].

    Args:
      params: arrays of the layer.
      spec: the layer.
      x_TE: inputs.
    """
    return np.asarray(_output(params, x_TE, spec))


@functools.partial(jax.jit, static_argnames=("spec",))
def _output(params: dict, x_TE, spec):
    return (leaf_ffn if isinstance(spec, LeafSpec) else tree_ffn)(params, x_TE, spec)[0]
