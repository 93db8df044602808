"""The kernels of experts.cu, thread by thread on a CPU, against float64: `emulated` has the instructions.

What a GPU alone can show, that XLA calls them rightly, is in test_grouped.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tree.emulated import call, compiled
from tree_ffn.tree.kernels import experts


@pytest.fixture(autouse=True)
def few_pairs_a_job(monkeypatch):
    monkeypatch.setattr(experts, "job", lambda width: JOB)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return compiled("experts", tmp_path_factory.mktemp("emulated"))


JOB = 40  # fewer pairs than in use, so that a few hundred have parts


def written_plan(emulated, ids_TK, units, n_siblings=1):
    """The plan that kernels make; -7 where they write nothing."""
    shapes = experts.saved_shapes(ids_TK, units, n_siblings).plan
    plan = experts.Plan(*(np.full(one.shape, -7, np.int32) for one in shapes))
    n_parts, part = experts.parts(ids_TK.shape[0])
    numbers = (*ids_TK.shape, n_siblings, units[0] // n_siblings, part, n_parts, JOB)
    call(emulated.PlanOf, ids_TK, *numbers, *plan)
    return plan


def planned(emulated, ids_TK, units):
    """The same, checked: every pair stands where sorting puts it."""
    plan = written_plan(emulated, ids_TK, units)
    order_N = np.argsort(ids_TK.reshape(-1), kind="stable")
    np.testing.assert_array_equal(plan.token_N, order_N // ids_TK.shape[1])
    np.testing.assert_array_equal(plan.slot_TK.reshape(-1)[order_N], np.arange(ids_TK.size))
    return plan


CASES = [
    (40, 8, 2, 6, 64), (150, 4, 4, 32, 64), (200, 16, 4, 16, 128), (60, 8, 2, 48, 64), (20, 8, 3, 128, 64),
    (1, 8, 2, 3, 64), (1400, 8, 1, 16, 64), (30, 520, 1, 8, 64),
]  # fmt: skip


@pytest.mark.parametrize("T, X, K, W, E", CASES)
@pytest.mark.parametrize("few", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_compute_their_sums(T, X, K, W, E, few, emulated, rng):
    """Of as many experts as there are, and where all tokens choose the same ones."""
    ids = np.argsort(rng.random((T, X)) + (X if few else 0) * (np.arange(X) >= K), axis=1)[:, :K]
    ids, U = np.ascontiguousarray(ids, np.int32), experts.filled(W)
    bf16 = lambda *shape: rng.normal(size=shape).astype(jnp.bfloat16)
    x, w, b = bf16(T, E), bf16(X, W, E), rng.normal(size=(X, W)).astype(np.float32)
    plan = planned(emulated, ids, (X, W, E))
    expert_N, token_N = np.sort(ids.reshape(-1)), plan.token_N
    float64 = lambda array: np.asarray(array, np.float64)
    rows_NE, w_NWE = float64(x)[token_N], float64(w)[expert_N]

    z = np.full((T * K, U), np.nan, np.float32)
    items = (plan.counts, plan.items, len(plan.items))
    call(emulated.UnitsOf, U, x, w, b, token_N, *items, E, W, z)
    want = np.einsum("ne,nwe->nw", rows_NE, w_NWE) + b[expert_N]
    np.testing.assert_allclose(z[:, :W], want, atol=1e-4)
    np.testing.assert_array_equal(z[:, W:], 0)

    c = np.full((T * K, U), 3, jnp.bfloat16)  # more units than there are add nothing
    c[:, :W] = bf16(T * K, W)
    y, turn = np.full((T, E), np.nan, jnp.bfloat16), np.full((T * K, 64), np.nan, jnp.bfloat16)
    call(emulated.SumsOf, U, c, w, plan.slot_TK, *items, T, K, E, W, turn.shape[1], turn, y)
    added, want = np.einsum("nw,nwe->ne", float64(c)[:, :W], w_NWE), np.zeros((T, E))
    np.add.at(want, token_N, added)
    sizes = np.zeros((T, E))
    np.add.at(sizes, token_N, abs(added))  # each is rounded, and so is their sum
    assert (abs(float64(y) - want) <= 2**-8 * (sizes + abs(want)) + 1e-4).all()

    dw, db = np.full((X, W, E), np.nan, np.float32), np.full((X, W), np.nan, np.float32)
    parts = [np.full((2 * T * K // JOB, *one.shape[1:]), np.nan, np.float32) for one in (dw, db)]
    jobs = (plan.counts, plan.jobs, len(plan.jobs), plan.ranges)
    call(emulated.GradsOf, U, c, x, token_N, *jobs, X, E, W, *parts, dw, db)
    chose_XN = (expert_N == np.arange(X)[:, None]).astype(np.float64)
    want = np.einsum("xn,nw,ne->xwe", chose_XN, float64(c)[:, :W], rows_NE, optimize=True)
    np.testing.assert_allclose(dw, want, atol=1e-4)
    np.testing.assert_allclose(db, chose_XN @ float64(c)[:, :W], atol=1e-4)


def test_ids_out_of_range_and_named_twice_stay_inside(emulated):
    """Routers give neither; kernels write nowhere else and take the nearest expert, once."""
    ids = np.array([[-5, 1], [1, 99], [2, 2]], np.int32)
    plan = written_plan(emulated, ids, (4, 3, 64))
    assert plan.slot_TK.tolist() == [[0, 1], [2, 4], [3, ~3]] and plan.starts[-1] == 5
    assert plan.token_N.tolist() == [0, 0, 1, 2, 1, -7]


@pytest.mark.parametrize("n_siblings", [2, 4])
def test_siblings_of_a_token_are_one_pair(n_siblings, emulated, rng):
    """It stands where sorting puts it, and choices after the first say that they come again."""
    ids = np.argsort(rng.random((500, 16)), axis=1)[:, :5].astype(np.int32)
    plan, sums = written_plan(emulated, ids, (16, 6, 64), n_siblings), ids // n_siblings
    sums_and_tokens = np.unique(np.stack([sums, np.arange(500)[:, None] + 0 * sums]).reshape(2, -1), axis=1)
    n_pairs = sums_and_tokens.shape[1]
    np.testing.assert_array_equal(plan.token_N[:n_pairs], sums_and_tokens[1])
    assert plan.starts[-1] == n_pairs and (plan.token_N[n_pairs:] == -7).all()
    place = np.maximum(plan.slot_TK, ~plan.slot_TK)
    np.testing.assert_array_equal(sums_and_tokens[0][place], sums)
    again = [[sum_ in row[:k] for k, sum_ in enumerate(row)] for row in sums.tolist()]
    np.testing.assert_array_equal(plan.slot_TK < 0, again)
