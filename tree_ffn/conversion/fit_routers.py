"""Linear decisions fitted to the tokens that arrive at a node: which side of it is worth visiting.

Every leaf of a tree has a value for every token, J leaves in all. A node decides by what its two sides can
give at best:

    gain[t] = max_{leaves right} value[j, t] - max_{leaves left} value[j, t]

At first the value of a leaf is the energy of the units on its path, where the energy of a unit is the square
of what it adds to the output; later it is how much of the error its path takes away (see `refit`).

    e[f, t] = act(z[f, t])^2 ||w_out[f]||^2
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tree_ffn.tree import TreeSpec
from tree_ffn.tree.shape import TreeShape, path_of

NEWTON_STEPS, CG_STEPS = 6, 16
STEP_SHARES = (1.0, 0.5, 0.25, 0.0625, 0.0)
# In tokens: what a router has seen of a direction counts against this many that say nothing.
RIDGE = 16.0
# Tokens up to which a fit runs on the CPU: hundreds of small products in turn, which an accelerator would
# spend on starting them.
SMALL = 1024
UNIT_ARRAYS = ("w_in", "b_in", "w_out")


def fit_router(x_TE: np.ndarray, gain_T: np.ndarray, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """The linear decision that goes right where that gains: logistic regression weighted by the stakes.

        min  sum_t |g_t| / mean|g| log(1 + exp(-sign(g_t) (<w, x_t> - threshold))) + ridge var(x) ||w||^2 / 2

    Args:
      x_TE: float32 inputs of the tokens that arrive at the node.
      gain_T: g, what going right gains over going left.
      ridge: strength of the prior, in tokens.

    Returns:
      w_E float32 and the threshold; zeros, which go left, where there is nothing to gain.

    Example:
      >>> w, threshold = fit_router(np.array([[-1.0], [0.5], [1.0]], np.float32), np.array([-1.0, 2.0, 1.0]))
      >>> bool(w[0] > 0)
      True
    """
    stake = np.abs(gain_T).mean() if len(gain_T) else 0.0
    if not stake > 0:
        return np.zeros(x_TE.shape[1], np.float32), 0.0
    centre_E = x_TE.mean(axis=0)
    a_TE = np.concatenate([x_TE - centre_E, np.ones((len(x_TE), 1), np.float32)], axis=1)
    prior_E = np.full(a_TE.shape[1], ridge * max(float(x_TE.var(axis=0).mean()), 1e-12), np.float32)
    prior_E[-1] = 1e-2 * ridge  # of the threshold
    missing = max(256, 1 << (len(x_TE) - 1).bit_length()) - len(x_TE)  # few sizes, few programs
    pad = lambda array: np.pad(array.astype(np.float32), ((0, missing), *((0, 0),) * (array.ndim - 1)))
    with jax.default_device(_host() if len(x_TE) + missing <= SMALL else None):
        v_E = np.asarray(_newton(pad(a_TE), pad(np.sign(gain_T)), pad(np.abs(gain_T) / stake), prior_E))
    return v_E[:-1], float(v_E[:-1] @ centre_E - v_E[-1])


@functools.cache
def _host():
    """The CPU; None where JAX_PLATFORMS names the accelerator alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@jax.jit
def _newton(a_TE: jax.Array, sign_T: jax.Array, weight_T: jax.Array, prior_E: jax.Array) -> jax.Array:
    """The minimum of `fit_router` by Newton steps, each solved by conjugate gradients: [E]."""

    def objective(v_E):
        return weight_T @ jax.nn.softplus(-sign_T * (a_TE @ v_E)) + prior_E @ jnp.square(v_E) / 2

    def step(v_E, _):
        p_T = jax.nn.sigmoid(sign_T * (a_TE @ v_E))
        slope_E = prior_E * v_E - a_TE.T @ (weight_T * sign_T * (1 - p_T))
        curve = lambda u_E: a_TE.T @ (weight_T * p_T * (1 - p_T) * (a_TE @ u_E)) + prior_E * u_E
        step_E, _ = jax.scipy.sparse.linalg.cg(curve, slope_E, maxiter=CG_STEPS)
        tried = v_E[None] - jnp.array(STEP_SHARES, jnp.float32)[:, None] * step_E[None]
        return tried[jnp.argmin(jax.vmap(objective)(tried))], None

    return jax.lax.scan(step, jnp.zeros_like(prior_E), length=NEWTON_STEPS)[0]


def path_units(shape: TreeShape) -> np.ndarray:
    """The units of a tree that every path visits: int64 [J, sum_l W_l], J = 2^D.

    Example:
      >>> path_units(TreeShape(n_trees=1, depth=1, node_width=(1, 2))).tolist()
      [[0, 1, 2], [0, 3, 4]]
    """
    paths = (path_of(leaf, shape.depth) for leaf in range(shape.n_leaves))
    return np.array([[u for node in path for u in shape.node_units(node)] for path in paths])


def path_energies(energy_FT: np.ndarray, unit_U: np.ndarray, shape: TreeShape) -> np.ndarray:
    """Energy of the units on every path of a tree: float32 [J, T].

    Args:
      energy_FT: the units' energies.
      unit_U: which unit of the dense layer stands in each place of the tree; -1 where none does.
      shape: of the tree.
    """
    energy_UT = np.where(unit_U[:, None] < 0, 0, energy_FT[unit_U])
    return np.stack([energy_UT[units].sum(axis=0) for units in path_units(shape)])


def fit_tree(x_TE: np.ndarray, value_JT: np.ndarray, shape: TreeShape) -> tuple[np.ndarray, np.ndarray]:
    """Routers of a tree, from the root down; each sees the tokens that those above send to it.

    Args:
      x_TE: float32 inputs of the layer.
      value_JT: the values of the tree's leaves.
      shape: of the tree.

    Returns:
      w_RE and threshold_R, float32, R = 2^D - 1.
    """
    best_NT = np.concatenate([np.empty((shape.n_deciding, len(x_TE)), np.float32), value_JT])
    for node in reversed(range(shape.n_deciding)):
        best_NT[node] = np.maximum(best_NT[2 * node + 1], best_NT[2 * node + 2])
    w_RE = np.zeros((shape.n_deciding, x_TE.shape[1]), np.float32)
    threshold_R = np.zeros(shape.n_deciding, np.float32)
    arrived = {0: np.arange(len(x_TE))}
    for node in range(shape.n_deciding):
        tokens, left, right = arrived.pop(node), 2 * node + 1, 2 * node + 2
        gain_T = best_NT[right, tokens] - best_NT[left, tokens]
        w_RE[node], threshold_R[node] = fit_router(x_TE[tokens], gain_T)
        goes_right = x_TE[tokens] @ w_RE[node] > threshold_R[node]
        arrived |= {left: tokens[~goes_right], right: tokens[goes_right]}
    return w_RE, threshold_R


def put_routers(params: dict, spec: TreeSpec, w_RE: np.ndarray, threshold_R: np.ndarray, tree: int) -> dict:
    """The layer with the routers of one tree: separate ones, or in the place of first units (w_out = 0).

    Args:
      params: arrays of the layer, as `tree.init_params` names them.
      spec: of the layer; router `frozen` keeps them separate.
      w_RE, threshold_R: of `fit_tree`.
      tree: which.
    """
    if spec.router == "frozen":
        w_PRE, threshold_PN = params["router"]["w"].copy(), params["threshold"].copy()
        w_PRE[tree], threshold_PN[tree, : len(threshold_R)] = w_RE, threshold_R
        return params | {"router": {"w": w_PRE}, "threshold": threshold_PN}
    first, params = list(spec.shape.router_units), params | {n: params[n].copy() for n in UNIT_ARRAYS}
    params["w_in"][tree, first], params["b_in"][tree, first] = w_RE, -threshold_R
    params["w_out"][tree, first] = 0
    return params
