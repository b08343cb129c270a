"""What the numbers of the commands may be. Each function raises Mistake, naming the option and what is allowed."""

from __future__ import annotations

import math

from kfac_triton.tuning.errors import Mistake

SECONDS = 1e8  # three years
TRIALS, SEEDS, STEPS = 100_000, 1_000, 1_000_000
JOBS, THREADS = 256, 1_024


def whole(option: str, value: int | None, most: int, *, least: int = 1, why: str = "") -> None:
    """An integer from `least` to `most`; None is the default's."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise Mistake(f"{option} {value!r}: a whole number")
    if value < least:
        raise Mistake(f"{option} {value}: at least {least}{why}")
    if value > most:
        raise Mistake(f"{option} {value}: at most {most}{why}")


def seconds(option: str, value: float | None) -> None:
    """A positive number of seconds; None is the default's."""
    if value is not None and not 1e-3 <= value <= SECONDS:
        raise Mistake(f"{option} {value:g}: a positive number of seconds, from 0.001 to {SECONDS:g}")


def finite(option: str, value: float | None) -> None:
    """Neither NaN nor infinite; None is the default's."""
    if value is not None and not math.isfinite(value):
        raise Mistake(f"{option} {value:g}: a finite number")
