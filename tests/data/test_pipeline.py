"""The order of rows and the batches made of it."""

import importlib.util
import itertools

import numpy as np
import pytest

from tree_ffn.data import Batches, row_order, valid_batches
from tree_ffn.data.cache import ArrayRows
from tree_ffn.data.pipeline import first_rows
from tree_ffn.errors import InputError


def numbered(n_rows: int) -> ArrayRows:
    """Rows whose tokens say which row they are."""
    return ArrayRows(np.repeat(np.arange(n_rows, dtype=np.uint16)[:, None], 5, axis=1))


def positions(seed, n_rows, batch_size, steps):
    return np.concatenate([row_order(seed, step, batch_size, n_rows) for step in range(steps)])


@pytest.mark.parametrize("n_rows", [1, 2, 3, 7, 64, 100, 1023])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_every_epoch_is_a_permutation(n_rows, batch_size):
    epochs = 3
    taken = positions(7, n_rows, batch_size, -(-epochs * n_rows // batch_size))[: epochs * n_rows]
    for epoch in taken.reshape(epochs, n_rows):
        assert sorted(epoch) == list(range(n_rows))


def test_order_does_not_depend_on_the_batch_size():
    assert (positions(3, 50, 4, 30) == positions(3, 50, 120, 1)).all()


def test_order_is_fixed_for_good():
    # Runs are resumed by later versions: a change here would silently show rows twice.
    assert row_order(0, 0, 8, 100).tolist() == FIXED[0]
    assert row_order(11, 10**6, 8, 10**7).tolist() == FIXED[1]


FIXED = (
    [71, 19, 90, 41, 82, 93, 46, 15],
    [3313579, 2050741, 9739255, 5266500, 2544252, 3938837, 3744727, 5249504],
)


def test_epochs_and_seeds_differ_and_mix():
    n = 1000
    orders = [positions(seed, n, n, 4).reshape(4, n) for seed in range(5)]
    orders = np.concatenate(orders).astype(float)
    correlation = np.corrcoef(np.vstack([orders, np.arange(n)[None]])) - np.eye(len(orders) + 1)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)
    neighbours = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(neighbours - n / 3) < 20  # the mean distance of two random rows


def test_each_place_sees_each_row():
    """Chi-square of 6 rows over 6 places in 3,000 epochs; 25 degrees of freedom."""
    orders = positions(1, 6, 6, 3000).reshape(3000, 6)
    counts = np.array([np.bincount(orders[:, place], minlength=6) for place in range(6)])
    assert ((counts - 500.0) ** 2 / 500).sum() < 60


def test_at_reads_the_rows_of_the_order():
    batches = Batches(numbered(30), batch_size=8, seed=5)
    batch = batches.at(9)
    assert batch.shape == (8, 5) and batch.dtype == np.int32
    assert (batch[:, 0] == row_order(5, 9, 8, 30)).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_iterate_equals_at(workers):
    if workers and not importlib.util.find_spec("grain"):
        pytest.skip("grain is not installed")
    batches = Batches(numbered(30), batch_size=8, seed=5, workers=workers)
    iterator = batches.iterate(start_step=3)
    for step, batch in zip(range(3, 15), iterator):
        assert (batch == batches.at(step)).all()
    if workers:
        iterator.close()


def test_fewer_rows_than_a_batch():
    assert sorted(Batches(numbered(3), batch_size=9, seed=0).at(0)[:, 0]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "n, n_rows, expected",
    [
        (2, 30, [8, 8]),
        (0, 30, [8, 8, 8, 6]),
        (9, 30, [8, 8, 8, 6]),
        (5, 4, [4]),
        (1, 1, [1]),
        (0, 16, [8, 8]),
    ],
)
def test_valid_batches_are_fixed_and_without_repeats(n, n_rows, expected):
    first = list(valid_batches(numbered(n_rows), 8, n))
    assert [batch.shape for batch in first] == [(size, 5) for size in expected]
    assert all((a == b).all() for a, b in zip(first, valid_batches(numbered(n_rows), 8, n)))
    taken = list(itertools.chain.from_iterable(batch[:, 0] for batch in first))
    assert len(set(taken)) == len(taken) and (n or len(taken) == n_rows)
    other = np.concatenate([batch[:, 0] for batch in valid_batches(numbered(n_rows), 7)])
    assert other[: len(taken)].tolist() == taken  # whatever the batch size


def test_first_rows_of_several_sources():
    sources = [numbered(5), numbered(0), numbered(9)]
    batches = [batch[:, 0].tolist() for batch in first_rows(sources, 12, 4)]
    assert [len(batch) for batch in batches] == [4, 1, 4, 3]
    whole = [batch[:, 0].tolist() for batch in first_rows(sources, 99, 9)]
    assert [sorted(batch) for batch in whole] == [list(range(5)), list(range(9))]
    assert [*batches[0], *batches[1]] == whole[0] and [*batches[2], *batches[3]] == whole[1][:7]


def test_bad_batch_sizes():
    with pytest.raises(InputError, match=r"^train\.batch_size: "):
        Batches(numbered(3), batch_size=0, seed=0)


def test_no_rows():
    with pytest.raises(InputError, match="has no rows"):
        Batches(numbered(0), 8, 0)
