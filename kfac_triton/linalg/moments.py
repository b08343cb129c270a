"""Second moments of rows, added to running averages. Knows tensors, not modules.

An average is dense (..., d, d) or the diagonal (..., d) alone; leading axes are the groups of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfac_triton import ops
from kfac_triton.ops import OneHot, Patches, Rows


def average_weights(k: Tensor, decay: float, ok: Tensor) -> tuple[Tensor, Tensor]:
    """(beta, 1 - beta) of the k-th average, F <- beta F + (1 - beta) new, with beta = min(1 - 1/k, decay).

    A flat mean over the first 1 / (1 - decay) updates, an exponential one after; nothing but data enters it (Martens &
    Grosse 2015, section 5). `k` (0-d) counts from 1. Where `ok` is false the average stays: (1, 0).
    """
    beta = torch.clamp(1 - 1 / k.clamp(min=1), max=decay)
    beta = torch.where(ok, beta, torch.ones_like(beta))
    return beta, 1 - beta


class Accumulation(NamedTuple):
    """F <- beta F + alpha * sum over the row matrices X of X^T X; with `bias`, of [X, 1]^T [X, 1].

    F (..., d, d), or (..., d) when `diagonal`; every X (..., n, d), or with an axis of images before n; alpha and beta
    0-d.
    """

    F: Tensor
    rows: Sequence[Rows]
    alpha: Tensor
    beta: Tensor
    bias: bool
    diagonal: bool


def accumulate_(averages: Sequence[Accumulation]) -> None:
    """Updates many averages, each of another F: one operator for the first matrices of all, one for the second, ..."""
    for average in averages:
        if average.diagonal:
            _accumulate_diagonals_(average)
    dense = [average for average in averages if not average.diagonal]
    for first, matrices in enumerate(zip_longest(*(average.rows for average in dense))):
        present = [(average, X) for average, X in zip(dense, matrices, strict=True) if X is not None]
        written: list[tuple[Accumulation, Rows]] = [(average, X) for average, X in present if isinstance(X, Tensor)]
        unwritten: list[tuple[Accumulation, Rows]] = [(average, X) for average, X in present if isinstance(X, Patches)]
        _call(ops.syrk_, written, first == 0)
        _call(ops.conv_syrk_, unwritten, first == 0)


def _call(operator: Callable[..., None], updates: Sequence[tuple[Accumulation, Rows]], first: bool) -> None:
    if updates:
        operator(
            [average.F for average, _ in updates],
            [X for _, X in updates],
            [average.alpha for average, _ in updates],
            [average.beta if first else torch.ones_like(average.beta) for average, _ in updates],
            bias=[average.bias for average, _ in updates],
        )


def by_form(rows: Sequence[Rows], form: str, F: Tensor, ones: bool) -> tuple[Sequence[Rows], bool]:
    """The row matrices as an average F of that form takes them, and whether they still lack the homogeneous 1."""
    if form != "blocks":
        return rows, ones
    return [blocked(X, F.shape, ones) for X in rows], False


def blocked(X: Rows, shape: torch.Size, ones: bool) -> Tensor:
    """Rows (n, d), with a homogeneous 1 where there are `ones`, by the blocks of a factor (b, w, w): (b, n, w)."""
    assert isinstance(X, Tensor)
    rows = pad(X.flatten(0, -2), (0, 1), value=1.0) if ones else X.flatten(0, -2)
    b, w = shape[:2]
    by_block: Tensor = pad(rows, (0, b * w - rows.shape[-1])).unflatten(-1, (b, w))
    return by_block.transpose(0, 1)


def rows_in(X: Rows, factor_axes: int) -> int:
    """How many rows a matrix of `Accumulation` has; `factor_axes` are those of its dense F."""
    if isinstance(X, Patches):
        return X.count()
    if isinstance(X, OneHot):
        return len(X.index)
    return int(X.shape[-2]) * (int(X.shape[-3]) if X.dim() > factor_axes else 1)


def _accumulate_diagonals_(average: Accumulation) -> None:
    beta = average.beta
    for X in average.rows:
        _accumulate_diagonal_(average.F, _squares(X, average.F, average.bias), average.alpha, beta)
        beta = torch.ones_like(beta)


def _squares(X: Rows, F: Tensor, bias: bool) -> Tensor:
    """The sums over the rows of their squared entries, as F (..., d)."""
    if isinstance(X, OneHot):
        return X.counts(F.dtype)
    rows = X.rows() if isinstance(X, Patches) else X
    rows = rows.flatten(-3, -2) if rows.dim() > F.dim() + 1 else rows
    squares = rows.to(F.dtype).square().sum(dim=-2)
    if bias:
        squares = torch.cat([squares, squares.new_full((*squares.shape[:-1], 1), rows.shape[-2])], dim=-1)
    return squares


def _accumulate_diagonal_(F: Tensor, squares: Tensor, alpha: Tensor, beta: Tensor) -> None:
    kept = torch.where(beta == 0, torch.zeros_like(F), beta * F)
    F.copy_(torch.where(alpha == 0, kept, kept + alpha * squares))
