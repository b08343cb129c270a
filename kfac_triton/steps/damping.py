"""How lambda and gamma follow the trust in the quadratic model (Martens & Grosse 2015, sections 6.5 and 6.6).

lambda damps the exact quadratic model; gamma = sqrt of the factored damping damps the preconditioner, and is searched
for on its own, since what damps one well need not suit the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COARSE, FINE, WORTH, CALIBRATION_TRIALS = 16.0, 4.0, 1.02, 10
AFTERWARDS = 1 / 16
CALIBRATION_STEPS = 10  # a calibration that fails in as many steps is given up


def factored_damping(group: Mapping[str, Any]) -> float:
    """What damps the factors of a group's blocks: gamma^2 where gamma is searched for, else the damping itself."""
    damping: float = group["gamma"] ** 2 if group["adaptive_damping"] else group["damping"]
    return damping


def calibration_due(group: dict[str, Any], blocks: int) -> bool:
    """Whether to look for a damping to start from: it suits fewer or more blocks, or none yet, than have a gradient.

    Sets of blocks that come and go do not ask for it each time, only the smallest and the largest so far.
    """
    calibrated = group["calibrated_least"] <= blocks <= group["calibrated_most"]
    return bool(group["calibrate_damping"]) and blocks > 0 and not calibrated


def note_calibration(group: dict[str, Any], blocks: int, *, success: bool) -> None:
    """Counts a calibration with `blocks` blocks, or a step that found none."""
    group["calibration_failures"] = 0 if success else group["calibration_failures"] + 1
    if success or group["calibration_failures"] == CALIBRATION_STEPS:
        group["calibration_failures"] = 0
        group["calibrated_least"] = min(group["calibrated_least"] or blocks, blocks)
        group["calibrated_most"] = max(group["calibrated_most"], blocks)


def reduction_ratio(change: float, predicted: float, resolution: float = 0.0) -> float:
    """rho: the change of the objective over the model's; -inf where either is no number.

    Where the model promises less than `resolution`, the rounding error of the objective, no ratio can be seen: 1, so
    that steps too short to matter lose their damping.
    """
    if 0 > predicted >= -resolution and abs(change) <= 100 * resolution:
        return 1.0
    rho = change / predicted if predicted < 0 else -math.inf
    return rho if math.isfinite(rho) else -math.inf


@dataclass(frozen=True)
class Adaptation:
    """Constants of the paper: lambda every `interval` steps by omega1 = 0.95^interval, gamma by omega2 every other."""

    interval: int = 5
    gamma_interval: int = 20
    least: float = 0.0
    most: float = 1e8
    gamma_most: float = 1.0

    @property
    def omega1(self) -> float:
        return 0.95**self.interval

    @property
    def omega2(self) -> float:
        return math.sqrt(0.95) ** self.gamma_interval

    def next_damping(self, damping: float, rho: float, fresh_rho: float = math.inf) -> float:
        """Less damping where the model can be trusted, more where not.

        `rho` is the reduction ratio on the step's own batch: less above 3/4, more below 1/4, as in the paper. There a
        model with more parameters than the batch has examples is always right, and the damping would vanish, so
        `fresh_rho`, the ratio on the batch after it, has a veto: no less damping unless a quarter of the promise is
        kept, and more where a quarter of it was lost. Between them lies the noise of small steps, as often above as
        below zero.
        """
        if not (rho >= 0.25 and fresh_rho >= -0.25):
            damping /= self.omega1
        elif rho > 0.75 and fresh_rho > 0.25:
            damping *= self.omega1
        return min(max(damping, self.least), self.most)

    def calibrated(self, damping: float, reduction_at: Callable[[float], tuple[float, float]]) -> float | None:
        """Where the first step should start: `reduction_at(damping)` tries one, (reduction, rho), and takes it back.

        None where the model is wrong at any damping, which says nothing about the next steps.

        Down by COARSE for as long as the objective falls further by WORTH each time and the model keeps half of what it
        promises; up by COARSE while rho < 1/4, or while that loses no more than WORTH; FINE down or up from there. The
        start is AFTERWARDS of what suits the first step best: fresh weights are no place to judge by, and damping that
        is too high falls slowly.
        """
        best, (reduction, rho) = damping, reduction_at(damping)
        for _ in range(CALIBRATION_TRIALS):
            if rho >= 0.25:
                break
            best *= COARSE
            reduction, rho = reduction_at(best)
        else:
            return None

        def better(candidate: float, worth: float) -> bool:
            nonlocal best, reduction
            found, rho = reduction_at(candidate)
            taken = rho >= 0.5 and found < worth * reduction
            if taken:
                best, reduction = candidate, found
            return taken

        def walked(ratio: float, worth: float) -> bool:
            """Whether it went at least a step."""
            steps = 0
            while steps < CALIBRATION_TRIALS and better(best * ratio, worth):
                steps += 1
            return steps > 0

        if not walked(1 / COARSE, WORTH) and best == damping:
            walked(COARSE, 1 / WORTH)
        if not better(best / FINE, WORTH):
            better(best * FINE, 1 / WORTH)
        return min(max(best * AFTERWARDS, self.least), self.most)

    def gammas(self, gamma: float, weight_decay: float) -> tuple[float, float, float]:
        """gamma, a smaller one not below sqrt(weight_decay), and a larger one not above `gamma_most`."""
        smaller = max(gamma * self.omega2, math.sqrt(weight_decay))
        return gamma, smaller, min(gamma / self.omega2, self.gamma_most)
