"""Two one-sided tests are those of SciPy's t test and of the closed form, and pairs are of one seed."""

import math

import numpy as np
import pytest

from experiments.reporting import equivalence
from experiments.reporting.equivalence import tost
from tree_ffn.errors import InputError
from tree_ffn.upgrades import VERSION


def row(name, seed, value, **changed):
    """A results row as far as pairs read it."""
    config = {
        "seed": seed,
        "train": {"steps": 9},
        "optim": {"lr": 1e-3},
        "config_version": VERSION,
        **changed,
    }
    return {"table": "t", "row": name, "metric": "val_loss", "seed": seed, "value": value, "config": config}


@pytest.mark.parametrize("n,mean", [(2, 0.0), (3, 0.004), (3, -0.012), (5, 0.009), (40, -0.0098)])
def test_tost_is_two_t_tests_of_scipy(n, mean):
    from scipy import stats  # takes a second

    found = np.random.default_rng(n).normal(mean, 0.006, n)
    said = tost(list(found), margin=0.01)
    above = stats.ttest_1samp(found, -0.01, alternative="greater").pvalue
    below = stats.ttest_1samp(found, 0.01, alternative="less").pvalue
    both = stats.ttest_1samp(found, 0.0)
    interval = both.confidence_interval(0.9)
    np.testing.assert_allclose(said.p_level, max(above, below), rtol=1e-9)
    np.testing.assert_allclose(said.p_differs, both.pvalue, rtol=1e-9)
    np.testing.assert_allclose([said.low, said.high], [interval.low, interval.high], rtol=1e-9)
    assert said.n == n and math.isclose(said.mean, found.mean(), rel_tol=1e-12)


def test_three_pairs_have_a_closed_form():
    """Student's t of 2 degrees of freedom: P(T < t) = 1/2 + t / (2 sqrt(2 + t^2))."""
    below = lambda t: 0.5 + t / (2 * math.sqrt(2 + t * t))
    s = 0.003 / math.sqrt(3)  # 0.001, 0.004, 0.007: mean .004, standard deviation .003
    said = tost([0.001, 0.004, 0.007], margin=0.01)
    assert math.isclose(said.p_level, below(-0.006 / s), rel_tol=1e-9)
    assert math.isclose(said.p_differs, 2 * below(-0.004 / s), rel_tol=1e-9)


@pytest.mark.parametrize("found", [[0.001, 0.002, 0.0], [0.009, 0.0105, 0.008], [-0.03, 0.03], [-0.0099] * 2])
def test_level_is_an_interval_within_the_margin(found):
    said = tost(found, margin=0.01)
    assert (said.p_level < 0.05) == (-0.01 < said.low and said.high < 0.01)


def test_differences_that_are_all_alike():
    assert tost([0.0, 0.0]).p_level == 0 and tost([0.0, 0.0]).p_differs == 1
    assert tost([0.25, 0.25]).p_level == 1 and tost([0.25, 0.25]).p_differs == 0


@pytest.mark.parametrize("found,margin,said", [
    ([0.1], 0.01, "differences: 1 is too few"),
    ([0.1, math.nan], 0.01, "differences: nan"),
    ([0.1, 0.2], 0.0, "margin: 0.0"),
    ([0.1, 0.2], math.inf, "margin: inf"),
])  # fmt: skip
def test_what_says_nothing_is_refused(found, margin, said):
    with pytest.raises(InputError, match=said):
        tost(found, margin)


def test_pairs_are_of_one_seed_each():
    rows = [row("a", 0, 1.0), row("a", 1, 2.0), row("a", 2, 9.0), row("b", 1, 0.5), row("b", 0, 0.25)]
    assert equivalence.differences(rows, "a", "b") == {0: 0.75, 1: 1.5}
    *_, line = equivalence.table(rows, [("a", "b")]).splitlines()
    assert line.startswith("| `a` | `b` | 2 | +1.1250 |")


def test_one_seed_has_a_difference_and_no_test():
    *_, line = equivalence.table([row("a", 0, 1.0), row("b", 0, 0.5)], [("a", "b")]).splitlines()
    assert line == "| `a` | `b` | 1 | +0.5000 |  |  |  |"


def test_rows_that_cannot_be_compared_are_refused():
    rows = [row("a", 0, 1.0), row("b", 0, 2.0, train={"steps": 18})]
    with pytest.raises(InputError, match="train.steps is both 9 and 18"):
        equivalence.differences(rows, "a", "b")
    rows = [row("a", 0, 1.0), row("a", 1, 1.0, optim={"lr": 2e-3}), row("b", 0, 2.0)]
    with pytest.raises(InputError, match="optim.lr is both"):
        equivalence.differences(rows, "a", "b")
    with pytest.raises(InputError, match="'c' has no val_loss"):
        equivalence.differences(rows, "a", "c")
