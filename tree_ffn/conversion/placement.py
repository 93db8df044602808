"""Where the units of a dense layer stand in the layer that it becomes: random, by use, or by co-activation.

A layer has trees, and the nodes of a tree have places (see `targets`): of a path layer all nodes, of a leaf
layer the leaves. Places that are left over hold nothing: they are the last ones of the deepest level.
"""

import numpy as np

from tree_ffn.conversion.fit_routers import fit_router
from tree_ffn.conversion.targets import Target
from tree_ffn.errors import InputError, check_choice
from tree_ffn.tree.shape import level_of

ROUNDS = 10


def check_room(target: Target, n_units: int) -> None:
    """Raises InputError unless every unit of a dense layer has a place."""
    room = sum(len(places) for tree in target.nodes for places in tree)
    if room < n_units:
        raise InputError(
            f"shape: {target.size} have room for {room:,} units, and the dense layer has {n_units:,}; use a "
            "larger shape, or leave units out (drop)."
        )


def place(
    method: str, target: Target, x_TE: np.ndarray, energy_FT: np.ndarray, seed: int = 0, drop: bool = False
) -> np.ndarray:
    """Places the units of a dense layer.

    - `random`: in random order.
    - `frequency`: the most used, by mean energy, at the top of the trees.
    - `cluster`: units are dealt to the trees, and each tree is built from the root: a node takes the units
      that the tokens arriving there use most, as many as it has places for, and the others part into halves
      by co-activation (see `split`).

    Args:
      method: one of `METHODS`.
      target: the layer that they come into.
      x_TE: float32 inputs of the calibration tokens.
      energy_FT: the units' energies (see `routers`).
      seed: of `random`, and of the first guess of `cluster`.
      drop: leave out units that find no place: the last of the order, or of those that arrive at a leaf.

    Returns:
      int64 [I]: which unit of the dense layer stands in each place; -1 where none does.

    Raises:
      InputError: an unknown method, or units without a place.
    """
    check_choice("method", method, METHODS)
    if not drop:
        check_room(target, len(energy_FT))
    rng = np.random.default_rng(seed)
    unit_I = np.full(target.spec.total_units, -1)
    if method == "cluster":
        order_F, n_trees = _by_use(energy_FT), len(target.nodes)
        for tree, nodes in enumerate(target.nodes):
            _grow(unit_I, nodes, order_F[tree::n_trees], x_TE, energy_FT, rng)
        return unit_I
    order_F = rng.permutation(len(energy_FT)) if method == "random" else _by_use(energy_FT)
    places = _level_by_level(target.nodes)[: len(order_F)]
    unit_I[places] = order_F[: len(places)]
    return unit_I


METHODS = ("random", "frequency", "cluster")


def _by_use(energy_FT: np.ndarray) -> np.ndarray:
    """Units by mean energy, the most used first."""
    return np.argsort(-energy_FT.sum(axis=1), kind="stable")


def _level_by_level(nodes: list[list[np.ndarray]]) -> np.ndarray:
    """All places: level by level, and in a level one of every node in turn."""
    turns = [
        (level_of(node), turn, tree, node, place)
        for tree, places in enumerate(nodes)
        for node, places_here in enumerate(places)
        for turn, place in enumerate(places_here)
    ]
    return np.array([place for *_, place in sorted(turns)], int)


def _grow(unit_I: np.ndarray, nodes: list[np.ndarray], units: np.ndarray, x_TE, energy_FT, rng) -> None:
    """Fills the places of one tree, from the root down."""
    arrived = {0: (units, np.arange(len(x_TE)))}
    for node, places in enumerate(nodes):
        units, tokens = arrived.pop(node)
        if len(places):
            used = energy_FT[np.ix_(units, tokens)].sum(axis=1)
            units = units[np.argsort(-used, kind="stable")]
            here, units = units[: len(places)], units[len(places) :]
            unit_I[places[: len(here)]] = here
        if 2 * node + 2 < len(nodes):
            left, right, goes_right = split(x_TE[tokens], energy_FT[np.ix_(units, tokens)], rng)
            arrived[2 * node + 1] = units[left], tokens[~goes_right]
            arrived[2 * node + 2] = units[right], tokens[goes_right]


def split(x_TE: np.ndarray, energy_FT: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts units into two halves that work for different tokens, and the tokens with them.

    With q = e / mean(e), so that strong and weak units count alike, in turns:

        tokens   right where sum_{right} q > sum_{left} q, as a linear router sees it
        units    right is the half with the larger q on right tokens than on left ones

    from the direction in which the units' co-activation varies most, until nothing changes.

    Args:
      x_TE: inputs of the tokens.
      energy_FT: energies of the units to part.
      rng: of the first guess.

    Returns:
      the places (in `energy_FT`) of the left and the right units, of which the left has the one more
      where they are odd, and bool [T]: which tokens go right.
    """
    n_units, n_tokens = energy_FT.shape
    n_left = -(-n_units // 2)
    if n_units < 2 or n_tokens < 2:
        return np.arange(n_left), np.arange(n_left, n_units), np.zeros(n_tokens, bool)
    mean_F1 = energy_FT.mean(axis=1, keepdims=True)
    q_FT = energy_FT / np.maximum(mean_F1, 1e-30)
    affinity_F = _main_direction(np.sqrt(q_FT), rng)
    right_F, goes_right = None, np.zeros(n_tokens, bool)
    for _ in range(ROUNDS):
        chosen_F = np.zeros(n_units, bool)
        chosen_F[np.argsort(affinity_F, kind="stable")[n_left:]] = True
        if right_F is not None and (chosen_F == right_F).all():
            break
        right_F = chosen_F
        gain_T = q_FT[right_F].mean(axis=0) - q_FT[~right_F].mean(axis=0)
        w_E, threshold = fit_router(x_TE, gain_T)
        goes_right = x_TE @ w_E > threshold
        if goes_right.all() or not goes_right.any():
            break
        affinity_F = q_FT[:, goes_right].mean(axis=1) - q_FT[:, ~goes_right].mean(axis=1)
    assert right_F is not None
    return np.flatnonzero(~right_F), np.flatnonzero(right_F), goes_right


def _main_direction(a_FT: np.ndarray, rng, rounds: int = 20) -> np.ndarray:
    """First left singular vector of units centred over tokens, by power iteration."""
    a_FT = a_FT - a_FT.mean(axis=1, keepdims=True)
    v_F = rng.standard_normal(len(a_FT)).astype(a_FT.dtype)
    for _ in range(rounds):
        v_F = a_FT @ (v_F @ a_FT)
        v_F = v_F / max(float(np.linalg.norm(v_F)), 1e-30)
    return v_F
