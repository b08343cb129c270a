"""Learning-rate schedules over the share of a run's seconds that is spent, the same family for every optimizer."""

from __future__ import annotations

import math

SHAPES = ("constant", "linear", "cosine", "exponential")
EXPONENTIAL_END = 0.01  # what an exponential schedule ends at, as a share of its start


def factor(shape: str, progress: float, warmup: float = 0.0) -> float:
    """What lr is multiplied by at `progress` in [0, 1]: a linear rise over the first `warmup`, then the shape."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 0.02)
    rest = (progress - warmup) / (1 - warmup)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1 - rest
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if shape == "exponential":
        return float(EXPONENTIAL_END**rest)
    raise ValueError(f"schedule {shape!r}: one of {', '.join(SHAPES)}")
