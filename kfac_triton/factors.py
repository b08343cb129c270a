"""Pure mathematics of the Kronecker factors: running averages, pi, damped inverses. Knows tensors, not modules.

A factor is dense (..., d, d) or, on a side too wide for that, the diagonal (..., d) alone; leading axes are the groups
of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_triton import ops, uncorrelated
from kfac_triton.ops import OneHot, Patches, Rows

_ESCALATIONS = 6
# Times the usual size of a batch's second moments, beyond which it stays out. Under a confident model the gradients of
# few examples make up most of the Fisher: one in 64 whose class had a probability of 4e-4 is no outlier yet.
OUTLIER, OUTLIER_GRADIENTS = 1e2, 1e5
# Times the usual size, what an outlier counts for in what is usual: a change that lasts is let in after some updates.
LASTING = 20.0
# The widest sides that are factorised together, which copies all of them: the inverses of six pairs took 0.42 of the
# time at a width of 17, 0.57 at 64, 0.98 at 128 and 1.05 at 256 (medians, two cores).
TOGETHER = 96
CONVERGED = 1e-2  # ||I - M X||_F of an iterated inverse: at most one percent off in any direction


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


class Shape(NamedTuple):
    """What one factor F stands for: a matrix of width `d` in a form of `blocks.layout`. `taps`, `bias`: of patches
    whose moments are those of uncorrelated pixels."""

    d: int
    form: str = "dense"
    taps: int = 1
    bias: bool = False

    @property
    def diagonal(self) -> bool:
        return self.form == "diagonal"


def shape_of(F: Tensor, *, diagonal: bool = False) -> Shape:
    """The shape of a dense or a diagonal factor."""
    return Shape(F.shape[-1], "diagonal" if diagonal else "dense")


def mean_diagonal(F: Tensor, shape: Shape) -> Tensor:
    """tr F / dim F, shape (...); of blocks, over all of them ()."""
    if shape.form == "uncorrelated":
        return uncorrelated.mean_diagonal(F, shape.taps, shape.bias)
    diagonal = F if shape.diagonal else F.diagonal(dim1=-2, dim2=-1)
    return diagonal.sum() / shape.d if shape.form == "blocks" else diagonal.mean(dim=-1)


def pi_of(a: Tensor, g: Tensor) -> Tensor:
    """pi from the factors' mean diagonals; 1 where either vanishes."""
    tiny = torch.finfo(a.dtype).tiny
    present = (a > tiny) & (g > tiny)
    return torch.where(present, (a / torch.where(present, g, 1.0)).sqrt(), torch.ones_like(a))


def damped_factors(A: Tensor, G: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """A + pi gamma I and G + gamma / pi I of dense factors, as `damped_inverses` inverts them."""
    a, g = mean_diagonal(A, shape_of(A)), mean_diagonal(G, shape_of(G))
    gamma = torch.as_tensor(damping, dtype=A.dtype, device=A.device).sqrt()
    present = (a > torch.finfo(A.dtype).tiny) & (g > torch.finfo(A.dtype).tiny)
    pi = pi_of(a, g)
    A, G = torch.where(present, A, 0.0), torch.where(present, G, 0.0)
    A.diagonal().add_(pi * gamma)
    G.diagonal().add_(gamma / pi)
    return A, G


class Pair(NamedTuple):
    """The factors of one weight, to be inverted with `damping`; `last` their inverses before, where there are any.

    `whole`: where one factor is a number, the damping is added to the product of both, in the other one.
    """

    A: Tensor
    G: Tensor
    damping: float | Tensor
    shape_A: Shape
    shape_G: Shape
    last: tuple[Tensor, Tensor] | None = None
    whole: bool = False


class _Side(NamedTuple):
    """scale F + d I, to be inverted, and then multiplied by scale."""

    F: Tensor
    scale: Tensor
    present: Tensor
    d: Tensor
    shape: Shape
    last: Tensor | None


def damped_inverses(
    A: Tensor, G: Tensor, damping: float | Tensor, *, diagonal_A: bool = False, diagonal_G: bool = False
) -> tuple[Tensor, Tensor] | None:
    """(A + pi gamma I)^-1 and (G + gamma / pi I)^-1, gamma = sqrt(damping), pi^2 = (tr A / dim A) / (tr G / dim G).

    Factored Tikhonov damping (Martens & Grosse 2015, section 6.3): damping is added to eigenvalues of the Fisher of
    the mean nll, so it has the units of the nll per squared parameter. With a = tr A / dim A and g likewise, both
    factors are inverted at mean diagonal 1, as (A / a + d I)^-1 / a with d = gamma / sqrt(a g), so that huge and tiny
    factors stay in range. Where either factor vanishes so does the Fisher, and both inverses are I / gamma.

    Written escalation for a side that will not factorise: Cholesky in its own precision; in double precision; with its
    damping d raised tenfold, six times at most, from no less than the rounding error of its own diagonal.

    Returns:
        A_inv and G_inv in the factors' shapes, or None where the escalation found no finite inverse.
    """
    shapes = shape_of(A, diagonal=diagonal_A), shape_of(G, diagonal=diagonal_G)
    return all_damped_inverses([Pair(A, G, damping, *shapes)])[0]


def all_damped_inverses(pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor] | None]:
    """`damped_inverses` of many weights.

    Where `ops.iterates` says so, sides with a last inverse take the Newton iteration from it, all at once, and
    Cholesky only if that does not converge. Narrow sides of the same width are factorised together, and by themselves
    only if one of them has no inverse.
    """
    sides = [side for pair in pairs for side in _sides(pair)]
    found: dict[int, Tensor] = {}
    if sides and ops.iterates(sides[0].F.device):
        found = _iterated(sides)
    found |= _factorised({i: side for i, side in enumerate(sides) if i not in found})
    inverses: list[tuple[Tensor, Tensor] | None] = []
    for i in range(0, len(sides), 2):
        A_inv = _inverse_of(sides[i], found.get(i))
        G_inv = None if A_inv is None else _inverse_of(sides[i + 1], found.get(i + 1))
        inverses.append(None if A_inv is None or G_inv is None else (A_inv, G_inv))
    return inverses


def _inverse_of(side: _Side, found: Tensor | None) -> Tensor | None:
    if found is None:
        scale = torch.where(side.present, side.scale, 0.0)
        if side.shape.form == "uncorrelated":
            found = _inverse_of_patches(side, scale)
        else:
            found = _inverse_of_sum(side.F, scale, side.d, diagonal=side.shape.diagonal)
    return None if found is None else found.mul_(_expand(side.scale, found, side.shape.diagonal))


def _inverse_of_patches(side: _Side, scale: Tensor) -> Tensor | None:
    S = side.F * _expand(scale, side.F, False)
    P_inv = _inverse_of_sum(uncorrelated.parts(S)[0], torch.ones_like(scale), side.d, diagonal=False)
    if P_inv is None:
        return None
    found = uncorrelated.inverse(S, P_inv, side.d, side.shape.taps, side.shape.bias)
    return found if bool(torch.isfinite(found).all()) else None


def _sides(pair: Pair) -> tuple[_Side, _Side]:
    A, G, damping, shape_A, shape_G, last, whole = pair
    a, g = mean_diagonal(A, shape_A), mean_diagonal(G, shape_G)
    gamma = torch.as_tensor(damping, dtype=A.dtype, device=A.device).sqrt()
    smallest = torch.finfo(A.dtype).tiny  # below, 1 / a overflows
    present = (a > smallest) & (g > smallest)
    a, g = torch.where(present, a, 1.0), torch.where(present, g, 1.0)
    d = torch.where(present, gamma / (a.sqrt() * g.sqrt()), gamma)
    d_A = d_G = d
    if whole and 1 in (shape_A.d, shape_G.d):
        none, all_of_it = torch.where(present, 0.0, d), torch.where(present, d * d, d)
        d_A, d_G = (none, all_of_it) if shape_A.d == 1 else (all_of_it, none)
    A_inv, G_inv = (None, None) if last is None else last
    return _Side(A, 1 / a, present, d_A, shape_A, A_inv), _Side(G, 1 / g, present, d_G, shape_G, G_inv)


def _iterated(sides: Sequence[_Side]) -> dict[int, Tensor]:
    """Inverses that the Newton iteration found, by the number of their side."""
    warm = [
        (i, side, side.last)
        for i, side in enumerate(sides)
        if side.last is not None and side.shape.form == "dense" and side.F.dtype == torch.float32
    ]
    if not warm:
        return {}
    M = []
    for _, side, _ in warm:
        damped = side.F * _expand(torch.where(side.present, side.scale, 0.0), side.F, False)
        damped.diagonal(dim1=-2, dim2=-1).add_(side.d.unsqueeze(-1))
        M.append(ops.padded(damped))
    X = [ops.padded(last.clone(memory_format=torch.contiguous_format)) for _, _, last in warm]
    residual = torch.empty(len(X), dtype=torch.float32, device=X[0].device)
    ops.newton_schulz_(X, M, residual)
    left = residual.tolist()
    return {i: x for (i, _, _), x, error in zip(warm, X, left, strict=True) if error <= CONVERGED}


def _factorised(sides: Mapping[int, _Side]) -> dict[int, Tensor]:
    """Inverses by Cholesky of matrices that share their width with others, by the number of their side."""
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, side in sides.items():
        if side.shape.form == "dense" and side.F.dim() == 2 and len(side.F) <= TOGETHER:
            alike.setdefault((len(side.F), side.F.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        if len(numbers) > 1:
            own = [sides[i] for i in numbers]
            scale = torch.stack([torch.where(side.present, side.scale, 0.0) for side in own])
            F = torch.stack([side.F for side in own]).mul_(_expand(scale, own[0].F, False))
            inverses = _cholesky_inverse_(F, torch.stack([side.d for side in own]))
            if inverses is not None:
                found |= zip(numbers, (inverse.clone() for inverse in inverses), strict=True)
    return found


def _expand(scale: Tensor, F: Tensor, diagonal: bool) -> Tensor:
    return scale.reshape(*scale.shape, *(1,) * (1 if diagonal else 2))


def _inverse_of_sum(F: Tensor, scale: Tensor, d: Tensor, *, diagonal: bool) -> Tensor | None:
    """(scale F + d I)^-1 by the escalation of `damped_inverses`."""

    def normalised(dtype: torch.dtype) -> Tensor:
        return F.to(dtype) * _expand(scale.to(dtype), F, diagonal)

    if diagonal:
        damped = normalised(F.dtype) + d.unsqueeze(-1)
        return 1 / damped if bool((torch.isfinite(damped) & torch.isfinite(1 / damped)).all()) else None
    inverse = _cholesky_inverse_(normalised(F.dtype), d)
    if inverse is None and F.dtype != torch.float64:
        inverse = _cholesky_inverse_(normalised(torch.float64), d.double())
    for power in range(1, _ESCALATIONS + 1):
        if inverse is not None:
            break
        raised = d.clamp(min=torch.finfo(F.dtype).eps).double() * 10.0**power
        inverse = _cholesky_inverse_(normalised(torch.float64), raised)
    return None if inverse is None else inverse.to(F.dtype)


def _cholesky_inverse_(F: Tensor, d: Tensor) -> Tensor | None:
    """(F + d I)^-1, or None where it has no finite one; writes over F."""
    F.diagonal(dim1=-2, dim2=-1).add_(d.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(F)
    # cholesky_inverse raises on a factor with a zero on its diagonal; what is not finite shows there, row by row
    if bool(info.any() | ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all()):
        return None
    # by rows, as a checkpoint is loaded into memory: the products with it then round alike; its columns are its rows
    inverse = torch.cholesky_inverse(factor).mT.contiguous()
    return inverse if bool(torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all()) else None
