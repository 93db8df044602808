"""Where the units of a dense layer stand in a layer of trees: random, by use, or by co-activation.

A place is (tree, unit of the tree). Places that are left over hold nothing: they
are the last ones of the deepest level.
"""

import numpy as np

from tree_ffn.conversion.fit_routers import fit_router
from tree_ffn.errors import InputError, check_choice
from tree_ffn.tree.shape import TreeShape, level_of

ROUNDS = 10


def free_places(shape: TreeShape, spent: bool) -> np.ndarray:
    """bool [U]: the places of a tree that may hold a unit; not those that routers are spent on."""
    free_U = np.ones(shape.tree_units, bool)
    if spent:
        free_U[list(shape.router_units)] = False
    return free_U


def room_of(shape: TreeShape, spent: bool) -> int:
    """How many units a layer of trees has places for."""
    return shape.n_trees * int(free_places(shape, spent).sum())


def check_room(shape: TreeShape, n_units: int, spent: bool) -> None:
    """Raises InputError unless every unit of a dense layer has a place."""
    room = room_of(shape, spent)
    if room >= n_units:
        return
    routers = f" ({shape.n_trees * shape.n_deciding:,} of its units are spent on routers)" if spent else ""
    raise InputError(
        f"shape: {shape.n_trees} trees of depth {shape.depth} and node_width {shape.node_width} have room "
        f"for {room:,} units{routers}, and the dense layer has {n_units:,}; use a larger shape, or leave "
        "units out (drop)."
    )


def place(
    method: str, shape: TreeShape, x_TE: np.ndarray, energy_FT: np.ndarray, spent: bool, seed: int = 0,
    drop: bool = False,
) -> np.ndarray:  # fmt: skip
    """Places the units of a dense layer.

    - `random`: in random order.
    - `frequency`: the most used, by mean energy, at the top of the trees.
    - `cluster`: units are dealt to the trees, and each tree is built from the root: a node takes the units
      that the tokens arriving there use most, and the others part into halves by co-activation (see `split`).

    Args:
      method: one of `METHODS`.
      shape: of the layer of trees.
      x_TE: float32 inputs of the calibration tokens.
      energy_FT: the units' energies (see `routers`).
      spent: whether the first unit of every deciding node is spent on its router.
      seed: of `random`, and of the first guess of `cluster`.
      drop: leave out units that find no place: the last of the order, or of those that arrive at a leaf.

    Returns:
      int64 [P, U]: which unit of the dense layer stands where; -1 where none does.

    Raises:
      InputError: an unknown method, or units without a place.
    """
    check_choice("method", method, METHODS)
    if not drop:
        check_room(shape, len(energy_FT), spent)
    rng = np.random.default_rng(seed)
    if method == "cluster":
        return _clustered(shape, x_TE, energy_FT, spent, rng)
    if method == "random":
        return _in_order(shape, rng.permutation(len(energy_FT)), spent)
    return _in_order(shape, _by_use(energy_FT), spent)


METHODS = ("random", "frequency", "cluster")


def _by_use(energy_FT: np.ndarray) -> np.ndarray:
    """Units by mean energy, the most used first."""
    return np.argsort(-energy_FT.sum(axis=1), kind="stable")


def _in_order(shape: TreeShape, order_F: np.ndarray, spent: bool) -> np.ndarray:
    """Level by level, and in a level one unit to every node in turn."""
    free_U = free_places(shape, spent)
    tree_PU = np.full((shape.n_trees, shape.tree_units), -1)
    for level, width in enumerate(shape.widths):
        start, stop = shape.level_starts[level : level + 2]
        units_PJW = tree_PU[:, start:stop].reshape(shape.n_trees, -1, width)  # a view
        for u in range(width):
            if not free_U[start + u]:
                continue
            n = min(units_PJW[..., u].size, len(order_F))
            units_PJW[..., u] = _padded(order_F[:n], units_PJW[..., u].size).reshape(shape.n_trees, -1)
            order_F = order_F[n:]
    return tree_PU


def _padded(units: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([units[:length], np.full(max(0, length - len(units)), -1)])


def _clustered(shape: TreeShape, x_TE, energy_FT, spent: bool, rng) -> np.ndarray:
    order_F, n_trees = _by_use(energy_FT), shape.n_trees
    return np.stack([
        _grown(shape, order_F[p::n_trees], x_TE, energy_FT, spent, rng) for p in range(n_trees)
    ])  # fmt: skip


def _grown(shape: TreeShape, units: np.ndarray, x_TE, energy_FT, spent: bool, rng) -> np.ndarray:
    """The places of one tree, from the root down: int64 [U]."""
    free_U, unit_U = free_places(shape, spent), np.full(shape.tree_units, -1)
    arrived = {0: (units, np.arange(len(x_TE)))}
    for node in range(shape.n_nodes):
        units, tokens = arrived.pop(node)
        places = np.array(shape.node_units(node))
        places = places[free_U[places]]
        used = energy_FT[np.ix_(units, tokens)].sum(axis=1)
        units = units[np.argsort(-used, kind="stable")]
        taken = min(len(places), len(units))
        unit_U[places[:taken]] = units[:taken]
        if level_of(node) < shape.depth:
            left, right, goes_right = split(x_TE[tokens], energy_FT[np.ix_(units[taken:], tokens)], rng)
            rest = units[taken:]
            arrived[2 * node + 1] = rest[left], tokens[~goes_right]
            arrived[2 * node + 2] = rest[right], tokens[goes_right]
    return unit_U


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
