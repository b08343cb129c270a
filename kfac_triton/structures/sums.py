"""The second moments of a sample, where they are needed by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_triton.joint import wide_dtype
from kfac_triton.linalg import moments
from kfac_triton.linalg.moments import Accumulation
from kfac_triton.operations.layout import DIAGONAL
from kfac_triton.ops import Rows
from kfac_triton.sample import Sample, tensor_of


def sums_of(own: Sample) -> tuple[Tensor, Tensor]:
    """sum a a^T / L and sum g g^T / rows of a sample whose sides are dense or diagonal."""
    weight, layout = own.layer.weight, own.layer.layout
    totals: list[Tensor] = list(own.sums or ())
    if not totals:
        shapes = layout.factor_shapes(weight.shape)
        totals = [torch.zeros(s, dtype=wide_dtype(weight), device=weight.device) for s in shapes]
        one = torch.ones((), dtype=totals[0].dtype, device=weight.device)
        sides: Sequence[tuple[Sequence[Rows], bool, str]] = ((own.a, own.ones, layout.A), (own.g, False, layout.G))
        moments.accumulate_(
            [
                Accumulation(total, rows, one, one, ones, form == DIAGONAL)
                for total, (rows, ones, form) in zip(totals, sides, strict=True)
            ]
        )
    counts = (own.terms, own.rows)
    A, G = (total / tensor_of(count, total).clamp(min=1) for total, count in zip(totals, counts, strict=True))
    return A, G
