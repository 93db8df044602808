"""Learning rates: which are tried next, and when the best one stands at an edge."""

import math

from experiments.sweeps import tuning

GRID = tuning.Grid("optim.lr", (1.0, 2.0, 4.0), extensions=2)


def test_the_choice_of_a_rate():
    next_values = lambda **losses: tuning.next_values({float(k[1:]): v for k, v in losses.items()}, GRID)
    assert next_values() == [1.0, 2.0, 4.0]
    assert next_values(r1=3.0, r4=1.0) == [2.0]
    assert next_values(r1=3.0, r2=2.0, r4=2.5) == []
    assert next_values(r1=1.0, r2=2.0, r4=2.5) == [0.5]
    assert next_values(r1=3.0, r2=2.0, r4=1.0) == [8.0]
    assert next_values(r1=3.0, r2=2.0, r4=1.0, r8=math.inf) == []
    assert next_values(r1=3.0, r2=2.0, r4=1.0, r8=0.9) == [16.0]
    assert next_values(r1=3.0, r2=2.0, r4=1.0, r8=0.9, r16=0.8) == []  # two extensions are all
    assert next_values(r1=math.inf, r2=math.inf, r4=math.inf) == [0.5]
    assert tuning.at_edge({1.0: 1.0, 2.0: 2.0}) and not tuning.at_edge({1.0: 3.0, 2.0: 2.0, 4.0: 2.5})
