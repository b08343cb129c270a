"""Damped inverses of the factors of many layers, those of one width in one factorisation. For a CPU, which reads at
once whether they were found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kfac_triton.numbers import Numbers, as_tensor


class Damped(NamedTuple):
    """scale (inner F + d I)^-1 is asked for: F (n, w, w), numbers (n,) as in `factors.Strengths`."""

    F: Tensor
    inner: Numbers
    scale: Numbers
    d: Numbers


def inverses(sides: Sequence[Damped]) -> list[Tensor | None]:
    """The inverses (n, w, w) of each, by Cholesky in its precision; None for all of a width where one was not found."""
    widths: dict[int, list[int]] = {}
    for number, side in enumerate(sides):
        widths.setdefault(side.F.shape[-1], []).append(number)
    found: list[Tensor | None] = [None] * len(sides)
    for numbers in widths.values():
        columns = zip(*(sides[i] for i in numbers), strict=True)
        inverse = _inverses(*(_joined(column) for column in columns))
        if inverse is not None:
            parts = inverse.split([len(sides[i].F) for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                found[i] = part
    return found


def _joined(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)  # type: ignore[arg-type]


def _inverses(F: Tensor, inner: Numbers, scale: Numbers, d: Numbers) -> Tensor | None:
    before, after, own = (as_tensor(t, F.dtype, F.device) for t in (inner, scale, d))
    damped = F * before[:, None, None]
    damped.diagonal(dim1=-2, dim2=-1).add_(own[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.numpy().any():
        return None
    with suppress(RuntimeError):  # of a zero on the diagonal
        inverse = torch.cholesky_inverse(factor).mT.mul_(after[:, None, None])  # by rows, which the columns equal
        # what is not finite shows on the diagonal, row by row
        if np.isfinite(np.einsum("nii->", inverse.numpy())):
            return inverse
    return None
