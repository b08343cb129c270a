"""How damping and gamma follow the reduction ratio (E18)."""

from __future__ import annotations

import math

import pytest

from kfac_triton.damping import Adaptation, factored_damping, reduction_ratio

INF = math.inf


@pytest.mark.parametrize(
    ("change", "predicted", "rho"),
    [
        (-2.0, -4.0, 0.5),
        (-4.0, -2.0, 2.0),
        (0.0, -1.0, 0.0),
        (1e-9, -1.0, -INF),  # the objective rose
        (math.nan, -1.0, -INF),
        (INF, -1.0, -INF),
        (-INF, -1.0, -INF),
        (-1.0, math.nan, -INF),
        (-1.0, 0.0, -INF),  # a model that promises nothing proves nothing
        (-1.0, 1.0, -INF),
    ],
)
def test_reduction_ratio(change, predicted, rho):
    assert reduction_ratio(change, predicted) == rho


@pytest.mark.parametrize(
    ("rho", "power"), [(0.76, 5), (5.0, 5), (0.75, 0), (0.5, 0), (0.25, 0), (0.2499, -5), (-1.0, -5), (-INF, -5)]
)
def test_damping_moves_by_the_papers_factor(rho, power):
    assert Adaptation().next_damping(150.0, rho) == pytest.approx(150.0 * 0.95**power, rel=1e-14)


def test_no_number_is_no_trust():
    assert Adaptation().next_damping(1.0, math.nan) == pytest.approx(0.95**-5)


def test_damping_stays_within_its_bounds():
    bounded = Adaptation(least=0.5, most=2.0)
    assert bounded.next_damping(0.55, 1.0) == 0.5
    assert bounded.next_damping(1.9, 0.0) == 2.0


def test_gammas():
    omega2 = 0.95**10
    assert Adaptation().gammas(0.5, 0.0) == pytest.approx((0.5, 0.5 * omega2, 0.5 / omega2))
    assert Adaptation().gammas(12.25, 0.0) == pytest.approx((12.25, 12.25 * omega2, 1.0))  # at most 1
    assert Adaptation().gammas(0.1, 0.01) == pytest.approx((0.1, 0.1, 0.1 / omega2))  # at least sqrt(eta)


def test_what_damps_the_factors():
    assert factored_damping({"adaptive_damping": True, "gamma": 0.5, "damping": 9.0}) == 0.25
    assert factored_damping({"adaptive_damping": False, "damping": 9.0}) == 9.0
