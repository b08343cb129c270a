"""The order that a search sees: hits by time, misses by how close they came, divergence last."""

from __future__ import annotations

import math

import pytest

from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.trainer import Point


def curve(*values: float, every: float = 1.0) -> list[Point]:
    return [Point(every * i, i, value, None) for i, value in enumerate(values)]


TARGET = Objective(seconds=4.0, target=1.0)


def test_the_time_to_a_target_lies_on_a_line_between_two_evaluations():
    assert TARGET.reached(curve(5, 3, 0.5)) == pytest.approx(1 + 2 / 2.5)
    assert TARGET.reached(curve(5, 3, 1.0)) == 2.0
    assert TARGET.reached(curve(0.5)) == 0.0
    assert TARGET.reached(curve(5, 3, 1.1)) is None
    assert TARGET.reached([]) is None
    assert Objective(4.0).reached(curve(5, 0)) is None


def test_a_run_that_passes_the_target_has_reached_it_though_it_comes_back():
    assert TARGET.score(curve(5, 0.5, 2)) == pytest.approx(4 / 4.5)


def test_every_hit_is_better_than_every_miss_and_every_miss_than_divergence():
    late, close, far, stuck, worse = (
        TARGET.score(curve(*values)) for values in ((5, 4, 3, 2, 1), (5, 1.01), (5, 4), (5, 5), (5, 9))
    )
    assert late == 4.0 < close < far < stuck == worse == 8.0 < TARGET.worst(curve(5, math.nan)) == 12.0


def test_a_miss_is_told_apart_by_the_way_that_is_left():
    assert TARGET.score(curve(5, 3)) == pytest.approx(4 * (1 + 2 / 4))


def test_without_a_target_the_last_value_counts_and_divergence_is_worse_than_the_start():
    free = Objective(4.0)
    assert free.score(curve(5, 3, 4)) == 4
    assert free.worst(curve(5, 3, math.inf)) > 5
    assert free.worst(curve(-5, -7)) > -5
    assert math.isfinite(free.worst([])) and math.isfinite(free.worst(curve(math.nan)))


def test_a_run_is_hopeless_once_it_is_late_by_more_than_the_slack():
    point = Point(2.0, 1, 3.0, None)
    assert TARGET.hopeless(point, best=1.5, slack=1.25)
    assert not TARGET.hopeless(point, best=1.7, slack=1.25)
    assert not TARGET.hopeless(point, best=math.inf, slack=1.25)
    assert not Objective(4.0).hopeless(point, best=0.1, slack=1.25)


@pytest.mark.parametrize(
    ("value", "rival", "start", "reach", "behind"),
    [
        (0.6, 0.5, 2.3, 0.4, True),
        (0.505, 0.5, 2.3, 0.4, False),  # a hundredth of a log scale's way
        (14.32, 14.30, 300.0, 5.0, False),  # a plateau
        (14.3, 13.0, 300.0, 12.8, True),  # and who has left it
        (10.0, 9.96, 10.0, 2.0, False),  # a plateau at the start
        (1e-2, 1e-3, 2.3, 1e-5, True),
        (0.4, 0.5, 2.3, 0.4, False),
        (-1.0, -3.0, 5.0, -3.0, True),
        (-2.9, -3.0, 5.0, -3.0, False),
    ],
)
def test_behind_is_by_more_than_noise_on_the_scale_of_the_way(value, rival, start, reach, behind):
    assert TARGET.behind(value, rival, start, reach) == behind
