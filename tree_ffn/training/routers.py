"""Routers that stop: decisions are learned in a first share of the training, and stand still from there on.

After `optim.routers_until` of the steps the parameters that decide keep every bit, and so do thresholds and
selection biases that balancing moves; everything else goes on learning. What stands still is the router, not
its input: as the layers below learn on, a token's path can still change.

Of trees, what decides is the first unit of every deciding node: its row of w_in and of b_in. Under router
`first_unit` that row is also a unit's input weights, so the unit stops there too and goes on by w_out alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.errors import InputError
from tree_ffn.models.moe import MoESpec
from tree_ffn.models.spec import FFNSpec, ModelSpec
from tree_ffn.training.optimizer import OptimSpec
from tree_ffn.tree import TreeSpec
from tree_ffn.tree.layout import layout_of
from tree_ffn.tree.leaf import LeafSpec


def router_rows(ffn: FFNSpec) -> dict[str, np.ndarray]:
    """Which entries of a layer's trained arrays decide: bool arrays by name, equal in their last axes.

    Trees: w_in [U, 1] and b_in [U], true at the first units of the nodes that decide, those of `hash_levels`
    left out. Experts: w_router and b_router, all of them. Layers that learn no decision have none.

    Example:
      >>> from tree_ffn.tree import TreeShape
      >>> rows = router_rows(TreeSpec(TreeShape(n_trees=1, depth=1, node_width=2)))
      >>> rows["b_in"].tolist(), rows["w_in"].shape
      ([True, False, False, False, False, False], (6, 1))
    """
    if isinstance(ffn, MoESpec) and ffn.router == "softmax":
        return {"w_router": np.ones((1, 1), bool)}
    if isinstance(ffn, LeafSpec) and ffn.router in ("tree", "softmax"):
        rows = {"w_router": np.ones((1, 1), bool), "b_router": np.ones(1, bool)}
        return rows if ffn.router == "tree" else {"w_router": rows["w_router"]}
    if isinstance(ffn, TreeSpec) and ffn.router != "frozen" and ffn.hash_levels < ffn.shape.depth:
        layout = layout_of(ffn)
        decides_U = np.zeros(layout.unit_starts[-1], bool)
        decides_U[layout.router_units()[layout.node_starts[ffn.hash_levels] :]] = True
        return {"w_in": decides_U[:, None], "b_in": decides_U}
    return {}


def check_routers(model: ModelSpec, optim: OptimSpec) -> None:
    """Raises InputError where routers are to stop in a model that has none."""
    if optim.router_steps is not None and not any(map(router_rows, model.ffns)):
        raise InputError(
            f"optim.routers_until: {optim.routers_until!r} cannot be used with ffn.kind (or model.layers) "
            "of layers whose decisions are not learned; use 1, or a layer of 'leaf', 'tree' or 'moe'."
        )


def hold_routers(updates: dict, model: ModelSpec, held: jax.Array) -> dict:
    """`updates` of the model's parameters, those of routers zero where `held`, weight decay and all.

    The gradient that routers would have had still counts in the norm that clips, and in Adam's moments.

    Args:
      updates: as the optimizer gives them, a tree like the parameters.
      model: the model.
      held: bool scalar, whether routers stand still in this step.
    """
    new = dict(updates)
    for i, (ffn, _) in enumerate(model.runs):
        layer = dict(updates[f"run_{i}"]["ffn"])
        for name, decides in router_rows(ffn).items():
            stands = held & jnp.broadcast_to(decides, layer[name].shape)
            layer[name] = jnp.where(stands, -jnp.zeros_like(layer[name]), layer[name])  # x + -0 is x
        new[f"run_{i}"] = {**updates[f"run_{i}"], "ffn": layer}
    return new


def hold_balance(new: dict, old: dict, held: jax.Array) -> dict:
    """The collection "routing" after a step: `new`, what balancing made of it, or `old` where `held`."""
    return jax.tree.map(lambda after, before: jnp.where(held, before, after), new, old)
