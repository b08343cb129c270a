"""The minimum of a quadratic model M(w) = w^T H w / 2 + b^T w over a few coefficients, float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DEPENDENT = 1e-10  # a smaller eigenvalue of unit curvatures means that the directions are one


def promised(w: np.ndarray, H: np.ndarray, b: np.ndarray) -> float:
    """M(w) = w^T H w / 2 + b^T w."""
    return float(w @ (H @ w / 2 + b))


def minimise(H: np.ndarray, b: np.ndarray, fixed: Sequence[float | None]) -> np.ndarray:
    """Where M(w) is smallest over the coefficients that are not `fixed`, which are two at most.

    H (k, k) positive semi-definite, b (k,), float64. Directions that vanish or depend on others get the smallest
    coefficients, in units in which every direction has curvature 1.
    """
    free = [i for i, value in enumerate(fixed) if value is None]
    w = np.array([0.0 if value is None else value for value in fixed])
    with np.errstate(invalid="ignore"):  # what is not finite has no minimum
        right, curvature = (b + H @ w).tolist(), H.tolist()
    units = [max(curvature[i][i], 0.0) for i in free]
    units = [1 / math.sqrt(one) if one > 0 else 0.0 for one in units]
    cosine = curvature[free[0]][free[1]] * units[0] * units[1] if len(free) == 2 else 0.0
    slopes = [right[i] * unit for i, unit in zip(free, units, strict=True)]
    if not all(map(math.isfinite, (*(curvature[i][i] for i in free), cosine, *slopes))):
        w[free] = math.nan
    elif cosine == 0.0:
        w[free] = [-unit * slope for unit, slope in zip(units, slopes, strict=True)]
    else:  # [[1, c], [c, 1]] has the eigenvalues 1 + c along (1, 1) and 1 - c along (1, -1)
        (first, second), least = slopes, DEPENDENT * (1 + abs(cosine))
        along, against = (
            slope / (2 * eigenvalue) if abs(eigenvalue) > least else 0.0
            for slope, eigenvalue in ((first + second, 1 + cosine), (first - second, 1 - cosine))
        )
        w[free] = -units[0] * (along + against), -units[1] * (along - against)
    return w


def within(w: np.ndarray, H: np.ndarray, b: np.ndarray, most: float) -> np.ndarray:
    """w, or the largest share of it whose predicted reduction is no more than `most`.

    An objective that is never negative cannot fall by more than its height; a model that says so was fitted to other
    examples than the gradient's.
    """
    slope, curvature = b @ w, w @ H @ w
    if not -(slope + curvature / 2) > most:
        return w
    # the smaller root of curvature s^2 / 2 + slope s + most
    share: float = 2 * most / (np.sqrt((slope**2 - 2 * curvature * most).clip(0, None)) - slope)
    return w * share
