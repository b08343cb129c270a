"""What a search makes smaller: the seconds to a target, or the metric after a run's seconds.

A run that misses its target is not dropped, it is censored: it counts as the run's seconds, and up to as many again by
how much of the way from the untrained metric to the target it left. So a search sees which misses were close, and every
miss is worse than every hit. A run that diverged or failed counts as worse than any miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kfac_triton.tuning.trainer import Point

ALIKE, SMALL = 0.03, 0.01
DIVERGED = 3.0  # times the seconds: beyond the 2 of a run that never left its start


@dataclass(frozen=True)
class Objective:
    """`seconds` of a run; `target`, a value of the metric, or None; `untrained`, the metric of a fresh model."""

    seconds: float
    target: float | None = None
    untrained: float = 0.0

    def reached(self, points: Sequence[Point]) -> float | None:
        """Seconds at which the metric came down to the target, on a straight line between two evaluations."""
        if self.target is None or not points:
            return None
        if points[0].train <= self.target:
            return points[0].seconds
        for before, after in pairwise(points):
            if after.train <= self.target:
                share = (before.train - self.target) / (before.train - after.train)
                return before.seconds + share * (after.seconds - before.seconds)
        return None

    def score(self, points: Sequence[Point]) -> float:
        """Of a run that ended, or stands, after `points`: smaller is better."""
        if self.target is None:
            return points[-1].train
        hit = self.reached(points)
        if hit is not None:
            return hit
        untrained = points[0].train
        left = (points[-1].train - self.target) / (untrained - self.target)
        return self.seconds * (1 + min(max(left, 0.0), 1.0))

    def worst(self, points: Sequence[Point]) -> float:
        """Of a run that diverged or failed, after `points`, if there are any."""
        if self.target is not None:
            return DIVERGED * self.seconds
        untrained = points[0].train if points and math.isfinite(points[0].train) else self.untrained
        return untrained + max(abs(untrained), 1.0)

    def behind(self, value: float, rival: float, start: float, reach: float) -> bool:
        """Whether a metric is clearly worse than a rival's.

        By more than `ALIKE` of the way that the rival has come from `start`, and by more than `SMALL` of the way to
        `reach`, the least metric known; on a log scale where all are positive. On a plateau nobody is behind.
        """
        if min(value, rival, start, reach) > 0:
            value, rival, start, reach = (math.log(one) for one in (value, rival, start, reach))
        return value - rival > max(ALIKE * (start - rival), SMALL * (start - reach), 0.0)

    def hopeless(self, point: Point, best: float, slack: float) -> bool:
        """Whether a run that has not reached the target at `point` is already `slack` times later than the best."""
        return self.target is not None and point.seconds > slack * best
