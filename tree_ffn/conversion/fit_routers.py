"""Linear decisions fitted to calibration tokens: which side of a node is worth how much.

Every expert (a path of a tree, or a leaf) has a value for every token. At first it is the energy of its
units, where the energy of a unit is the square of what it adds to the output; later it is how much of the
error the expert takes away (see `refit`).

    e[f, t] = act(z[f, t])^2 ||w_out[f]||^2

A router is a logistic regression: it minimises, over w and b, with weights of mean 1,

    sum_t right[t] log(1 + exp(-r[t])) + left[t] log(1 + exp(r[t])) + ridge var(x) ||w||^2 / 2,
    r[t] = <w, x_t> + b
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NEWTON_STEPS, CG_STEPS = 6, 16
STEP_SHARES = (1.0, 0.5, 0.25, 0.0625, 0.0)
# In tokens: what a router has seen of a direction counts against this many that say nothing.
RIDGE = 16.0
# Tokens up to which a fit runs on the CPU: hundreds of small products in turn, which an accelerator would
# spend on starting them.
SMALL = 1024
# Routers that are fitted at a time.
TOGETHER = 64


def fit_routers(
    x_TE: np.ndarray, right_NT: np.ndarray, left_NT: np.ndarray, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """N logistic regressions over the same tokens.

    Args:
      x_TE: float32 inputs of the tokens.
      right_NT: how much each token says for the right side of each node, at least 0.
      left_NT: the same for the left side.
      ridge: strength of the prior, in tokens.

    Returns:
      w_NE and b_N, float32; zeros where nothing is said.

    Example:
      >>> x = np.array([[-1.0], [0.5], [1.0]], np.float32)
      >>> w, b = fit_routers(x, np.array([[0.0, 2.0, 1.0]]), np.array([[1.0, 0.0, 0.0]]))
      >>> bool(w[0, 0] > 0)
      True
    """
    stake_N1 = (right_NT + left_NT).mean(axis=1, keepdims=True)
    stake_N1 = np.where(stake_N1 > 0, stake_N1, 1.0)
    centre_E = x_TE.mean(axis=0)
    a_TE = np.concatenate([x_TE - centre_E, np.ones((len(x_TE), 1), np.float32)], axis=1)
    prior_E = np.full(a_TE.shape[1], ridge * max(float(x_TE.var(axis=0).mean()), 1e-12), np.float32)
    prior_E[-1] = 1e-2 * ridge  # of b
    missing = max(256, 1 << (len(x_TE) - 1).bit_length()) - len(x_TE)  # few sizes, few programs
    pad = lambda array, axis: np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
    right_NT, left_NT = (pad((side / stake_N1).astype(np.float32), 1) for side in (right_NT, left_NT))
    with jax.default_device(_host() if len(x_TE) + missing <= SMALL else None):
        v_NE = np.asarray(_newton(pad(a_TE.astype(np.float32), 0), right_NT, left_NT, prior_E))
    return v_NE[:, :-1], v_NE[:, -1] - v_NE[:, :-1] @ centre_E


def fit_router(x_TE: np.ndarray, gain_T: np.ndarray, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """The linear decision that goes right where that gains, weighted by the stakes: w_E and a threshold.

    Args:
      x_TE: float32 inputs of the tokens that arrive at the node.
      gain_T: what going right gains over going left.
      ridge: strength of the prior, in tokens.

    Returns:
      w_E float32 and the threshold; zeros, which go left, where there is nothing to gain.

    Example:
      >>> w, threshold = fit_router(np.array([[-1.0], [0.5], [1.0]], np.float32), np.array([-1.0, 2.0, 1.0]))
      >>> bool(w[0] > 0)
      True
    """
    if not len(gain_T):
        return np.zeros(x_TE.shape[1], np.float32), 0.0
    w_NE, b_N = fit_routers(x_TE, np.maximum(gain_T, 0)[None], np.maximum(-gain_T, 0)[None], ridge)
    return w_NE[0], -float(b_N[0])


@functools.cache
def _host():
    """The CPU; None where JAX_PLATFORMS names the accelerator alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@jax.jit
def _newton(a_TE: jax.Array, right_NT: jax.Array, left_NT: jax.Array, prior_E: jax.Array) -> jax.Array:
    """The minima of `fit_routers` by Newton steps, each solved by conjugate gradients: [N, E]."""

    def objective(v_E, right_T, left_T):
        r_T = a_TE @ v_E
        loss = right_T @ jax.nn.softplus(-r_T) + left_T @ jax.nn.softplus(r_T)
        return loss + prior_E @ jnp.square(v_E) / 2

    def one(sides):
        right_T, left_T = sides
        both_T = right_T + left_T

        def step(v_E, _):
            p_T = jax.nn.sigmoid(a_TE @ v_E)
            slope_E = prior_E * v_E + a_TE.T @ (both_T * p_T - right_T)
            curve = lambda u_E: a_TE.T @ (both_T * p_T * (1 - p_T) * (a_TE @ u_E)) + prior_E * u_E
            step_E, _ = jax.scipy.sparse.linalg.cg(curve, slope_E, maxiter=CG_STEPS)
            tried = v_E[None] - jnp.array(STEP_SHARES, jnp.float32)[:, None] * step_E[None]
            losses = jax.vmap(objective, (0, None, None))(tried, right_T, left_T)
            return tried[jnp.argmin(losses)], None

        return jax.lax.scan(step, jnp.zeros_like(prior_E), length=NEWTON_STEPS)[0]

    return jax.lax.map(one, (right_NT, left_NT), batch_size=min(TOGETHER, right_NT.shape[0]))


def fit_tree(x_TE: np.ndarray, value_JT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Routers of a tree whose tokens go one way at each node: each sees those that the ones above send to it.

        gain[t] = max_{leaves right} value[j, t] - max_{leaves left} value[j, t]

    Args:
      x_TE: float32 inputs of the layer.
      value_JT: the values of the tree's J = 2^D leaves.

    Returns:
      w_RE and threshold_R, float32, R = 2^D - 1.
    """
    n_deciding = len(value_JT) - 1
    best_NT = np.concatenate([np.empty((n_deciding, len(x_TE)), np.float32), value_JT])
    for node in reversed(range(n_deciding)):
        best_NT[node] = np.maximum(best_NT[2 * node + 1], best_NT[2 * node + 2])
    w_RE = np.zeros((n_deciding, x_TE.shape[1]), np.float32)
    threshold_R = np.zeros(n_deciding, np.float32)
    arrived = {0: np.arange(len(x_TE))}
    for node in range(n_deciding):
        tokens, left, right = arrived.pop(node), 2 * node + 1, 2 * node + 2
        gain_T = best_NT[right, tokens] - best_NT[left, tokens]
        w_RE[node], threshold_R[node] = fit_router(x_TE[tokens], gain_T)
        goes_right = x_TE[tokens] @ w_RE[node] > threshold_R[node]
        arrived |= {left: tokens[~goes_right], right: tokens[goes_right]}
    return w_RE, threshold_R


def fit_beam(
    x_TE: np.ndarray, value_XT: np.ndarray, n_trees: int, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Routers of trees whose tokens take K leaves: each is fitted to how the value divides below its node.

    Every router sees all tokens, by what is below its node (`shares_below`), so the probability of a leaf is
    the share of the value that is expected there.

    Args:
      x_TE: float32 inputs of the layer.
      value_XT: the values of all trees' leaves, tree by tree.
      n_trees: P.
      top_k: K.

    Returns:
      w_RE and b_R, float32, R = X - P, level by level from the roots, in each level tree by tree.
    """
    right_RT, left_RT = shares_below(value_XT, n_trees, top_k)
    if not len(right_RT):
        return np.zeros((0, x_TE.shape[1]), np.float32), np.zeros(0, np.float32)
    return fit_routers(x_TE, right_RT, left_RT)


def shares_below(value_XT: np.ndarray, n_trees: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """What of a token's value is to the right and to the left of every node: float32 [R, T] each.

    Of a token the K leaves of the highest values count, each by its value if that is above 0.

    Args:
      value_XT: of every leaf for every token.
      n_trees: P, which divides X into trees of a power of two.
      top_k: K.

    Example:
      >>> right, left = shares_below(np.array([[3.0], [1.0], [-1.0], [2.0]]), n_trees=1, top_k=2)
      >>> right[:, 0].tolist(), left[:, 0].tolist()  # of the root, of its left child and of its right one
      ([2.0, 0.0, 2.0], [3.0, 3.0, 0.0])
    """
    least_T = np.partition(value_XT, -top_k, axis=0)[-top_k]
    levels = [np.where(value_XT >= least_T, np.maximum(value_XT, 0), 0).astype(np.float32)]
    while len(levels[0]) > n_trees:
        levels.insert(0, levels[0][0::2] + levels[0][1::2])
    of_side = lambda side: np.concatenate([levels[0][:0], *(level[side::2] for level in levels[1:])])
    return of_side(1), of_side(0)
