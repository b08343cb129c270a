"""How damping and gamma follow the reduction ratio (E18)."""

from __future__ import annotations

import math

import pytest

from kfac_triton.steps.damping import (
    CALIBRATION_STEPS,
    Adaptation,
    calibration_due,
    factored_damping,
    note_calibration,
    reduction_ratio,
)

INF = math.inf


@pytest.mark.parametrize(
    ("change", "predicted", "rho"),
    [
        (-2.0, -4.0, 0.5),
        (-4.0, -2.0, 2.0),
        (0.0, -1.0, 0.0),
        (1.0, -2.0, -0.5),  # the objective rose
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
    ("change", "predicted", "rho"),
    [
        (5e-7, -1e-7, 1.0),  # both drown in the rounding error
        (-5e-7, -1e-7, 1.0),
        (1e-3, -1e-7, -1e4),  # the change does not
        (5e-7, -1e-5, -0.05),  # neither does the promise
        (math.nan, -1e-7, -INF),
    ],
)
def test_a_promise_below_the_rounding_error_cannot_be_judged(change, predicted, rho):
    assert reduction_ratio(change, predicted, resolution=1e-6) == pytest.approx(rho)


@pytest.mark.parametrize(
    ("rho", "power"), [(0.76, 5), (5.0, 5), (0.75, 0), (0.5, 0), (0.25, 0), (0.2499, -5), (-1.0, -5), (-INF, -5)]
)
def test_damping_moves_by_the_papers_factor(rho, power):
    assert Adaptation().next_damping(150.0, rho) == pytest.approx(150.0 * 0.95**power, rel=1e-14)


@pytest.mark.parametrize(
    ("rho", "fresh", "power"),
    [
        (0.9, 0.3, 5),
        (0.9, 0.25, 0),  # less than a quarter of the promise kept on the next batch: no less damping
        (0.9, -0.25, 0),
        (0.9, -0.26, -5),  # a loss there
        (0.9, -INF, -5),
        (0.9, math.nan, -5),
        (0.5, 0.9, 0),
        (0.5, -0.3, -5),
        (0.1, 0.9, -5),
    ],
)
def test_the_next_batch_has_a_veto(rho, fresh, power):
    assert Adaptation().next_damping(2.0, rho, fresh) == pytest.approx(2.0 * 0.95**power, rel=1e-14)


def test_no_number_is_no_trust():
    assert Adaptation().next_damping(1.0, math.nan) == pytest.approx(0.95**-5)


def test_damping_stays_within_its_bounds():
    bounded = Adaptation(least=0.5, most=2.0)
    assert bounded.next_damping(0.55, 1.0) == 0.5
    assert bounded.next_damping(1.9, 0.0) == 2.0


def tried(table):
    """A first step that reduces by -table[damping][0] at rho = table[damping][1], and the dampings it was asked for."""
    asked = []

    def reduction_at(damping):
        asked.append(damping)
        gain, rho = table[damping]
        return -gain, rho

    return asked, reduction_at


@pytest.mark.parametrize(
    ("table", "found"),
    [
        # sixteenths while it gains, then a quarter of the best
        ({64: (1, 1.9), 4: (2, 1.8), 0.25: (1.5, 1.2), 1: (3, 1.2)}, 1),
        ({64: (1, 1.9), 4: (2, 1.8), 0.25: (2.5, 1.2), 1 / 64: (1, 1.2), 1 / 16: (2.6, 0.5)}, 1 / 16),
        # else four times the best, if that loses nothing worth having
        ({64: (1, 1.9), 4: (2, 1.8), 0.25: (1.5, 1.2), 1: (2.03, 1.2), 16: (1.97, 1.5)}, 16),
        ({64: (1, 1.9), 4: (2, 1.8), 0.25: (1.5, 1.2), 1: (2.03, 1.2), 16: (1.95, 1.5)}, 4),
        # the gain is below a fiftieth: not worth less damping; sixteen times as much costs more than that
        ({64: (1, 1.9), 4: (1.01, 1.8), 1024: (0.9, 1.9), 16: (1.01, 1.8), 256: (0.5, 1.9)}, 64),
        # a step that rises, or of which the model promises twice as much
        ({64: (1, 1.9), 4: (-5, -INF), 1024: (0.9, 1.9), 16: (2, 0.49), 256: (0.5, 1.9)}, 64),
        # up where less damping is worse and more costs nothing
        (
            {
                64: (1, 0.8),
                4: (0.5, 0.7),
                1024: (1.3, 0.9),
                16384: (1.29, 0.9),
                262144: (1, 1),
                4096: (1, 0.9),
                65536: (1.1, 0.9),
            },
            16384,
        ),
        # up where the model is wrong
        ({64: (-1, -INF), 1024: (-1, -INF), 16384: (1, 0.3), 4096: (0.5, 0.1), 65536: (0.9, 1.0)}, 16384),
        ({64: (-1, -INF), 1024: (1, 0.3), 256: (2, 0.6)}, 256),
    ],
)
def test_where_the_damping_starts(table, found):
    """At a sixteenth of what suits the first step best. A value that is met again on the way up is tried again."""
    asked, reduction_at = tried(table)
    best = Adaptation().calibrated(64, reduction_at) * 16
    assert (best, list(dict.fromkeys(asked))[: len(table)]) == (found, list(table))


def test_the_search_for_a_start_ends():
    asked = []

    def ever_better(damping):
        asked.append(damping)
        return -1 / damping, 2.0

    found = Adaptation().calibrated(1.0, ever_better)
    assert len(asked) == 12
    assert found == pytest.approx(16.0**-11 / 4)


def test_a_model_that_is_wrong_at_any_damping_tells_nothing_of_where_to_start():
    assert Adaptation(most=1e6).calibrated(1.0, lambda damping: (1.0, -INF)) is None


def test_when_a_calibration_is_due():
    """For the first blocks with a gradient, then for fewer or more than ever before; never for an initial damping."""
    group = {"calibrate_damping": True, "calibrated_least": 0, "calibrated_most": 0, "calibration_failures": 0}
    for blocks, due in (
        (0, False),
        (4, True),
        (4, False),
        (6, True),
        (5, False),
        (2, True),
        (3, False),
        (0, False),
        (7, True),
    ):
        assert calibration_due(group, blocks) is due
        if due:
            note_calibration(group, blocks, success=True)
    assert not calibration_due({**group, "calibrate_damping": False}, 9)
    for failures in range(1, CALIBRATION_STEPS + 1):
        assert calibration_due(group, 9)
        note_calibration(group, 9, success=False)
        assert group["calibration_failures"] == failures % CALIBRATION_STEPS
    assert not calibration_due(group, 9)
    assert (group["calibrated_least"], group["calibrated_most"]) == (2, 9)


def test_gammas():
    omega2 = 0.95**10
    assert Adaptation().gammas(0.5, 0.0) == pytest.approx((0.5, 0.5 * omega2, 0.5 / omega2))
    assert Adaptation().gammas(12.25, 0.0) == pytest.approx((12.25, 12.25 * omega2, 1.0))  # at most 1
    assert Adaptation().gammas(0.1, 0.01) == pytest.approx((0.1, 0.1, 0.1 / omega2))  # at least sqrt(eta)


def test_what_damps_the_factors():
    assert factored_damping({"adaptive_damping": True, "gamma": 0.5, "damping": 9.0}) == 0.25
    assert factored_damping({"adaptive_damping": False, "damping": 9.0}) == 9.0
