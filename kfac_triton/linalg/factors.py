"""Pure mathematics of the Kronecker factors: pi, damped inverses. Knows tensors, not modules.

A factor is dense (..., d, d) or, on a side too wide for that, the diagonal (..., d) alone; leading axes are the groups
of a grouped convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.linalg import uncorrelated
from kfac_triton.numbers import Numbers, on_host

_ESCALATIONS = 6
# The widest sides that are factorised together, which copies all of them: the inverses of six pairs took 0.42 of the
# time at a width of 17, 0.57 at 64, 0.98 at 128 and 1.05 at 256 (medians, two cores).
TOGETHER = 96
CONVERGED = 1e-2  # ||I - M X||_F of an iterated inverse: at most one percent off in any direction


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
    gamma = _scalar(damping, A).sqrt()
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
    """inner F + d I, to be inverted, and then multiplied by scale."""

    F: Tensor
    inner: Tensor
    scale: Tensor
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
    Cholesky only if that does not converge.
    """
    sides = [side for pair in pairs for side in _sides(pair)]
    found: dict[int, Tensor] = {}
    if sides and ops.iterates(sides[0].F.device):
        found = _iterated(sides)
    inverses: list[tuple[Tensor, Tensor] | None] = []
    for i in range(0, len(sides), 2):
        A_inv = _inverse_of(sides[i], found.get(i))
        G_inv = None if A_inv is None else _inverse_of(sides[i + 1], found.get(i + 1))
        inverses.append(None if A_inv is None or G_inv is None else (A_inv, G_inv))
    return inverses


def _inverse_of(side: _Side, found: Tensor | None) -> Tensor | None:
    if found is None:
        if side.shape.form == "uncorrelated":
            found = _inverse_of_patches(side, side.inner)
        else:
            found = _inverse_of_sum(side.F, side.inner, side.d, diagonal=side.shape.diagonal)
    return None if found is None else found.mul_(_expand(side.scale, found, side.shape.diagonal))


def _inverse_of_patches(side: _Side, scale: Tensor) -> Tensor | None:
    S = side.F * _expand(scale, side.F, False)
    P_inv = _inverse_of_sum(uncorrelated.parts(S)[0], torch.ones_like(scale), side.d, diagonal=False)
    if P_inv is None:
        return None
    found = uncorrelated.inverse(S, P_inv, side.d, side.shape.taps, side.shape.bias)
    return found if bool(torch.isfinite(found).all()) else None


class Strengths(NamedTuple):
    """(inner, scale, d) of both sides, numbers (...): the damped inverse is scale (inner F + d I)^-1.

    `inner` is 0 where either factor vanishes, and else `scale`, the inverse of the mean diagonal.
    """

    of_A: tuple[Numbers, Numbers, Numbers]
    of_G: tuple[Numbers, Numbers, Numbers]


def strengths(
    xp: Any, a: Numbers, g: Numbers, damping: Numbers, shape_A: Shape, shape_G: Shape, tiny: float, *,
    undivided: bool = False,
) -> Strengths:  # fmt: skip
    """How factors with the mean diagonals a and g are damped, see `damped_inverses`.

    `xp` is the library of the numbers, `tiny` the smallest number whose inverse the factors' dtype can hold.
    """
    gamma = xp.sqrt(damping)
    present = (a > tiny) & (g > tiny)
    a, g = xp.where(present, a, 1.0), xp.where(present, g, 1.0)
    d = xp.where(present, gamma / (xp.sqrt(a) * xp.sqrt(g)), gamma)
    d_A = d_G = d
    if undivided and 1 in (shape_A.d, shape_G.d):
        none, all_of_it = xp.where(present, 0.0, d), xp.where(present, d * d, d)
        d_A, d_G = (none, all_of_it) if shape_A.d == 1 else (all_of_it, none)
    inner_A, inner_G = xp.where(present, 1 / a, 0.0), xp.where(present, 1 / g, 0.0)
    return Strengths((inner_A, 1 / a, d_A), (inner_G, 1 / g, d_G))


def inverses(F: Tensor, inner: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """scale (inner F + d I)^-1 for matrices F (..., n, n), and whether each was found (...).

    By Cholesky in the precision of F; one that was not found may hold anything. None in the place of the flags: all
    were found, as the host knows. A device is not waited for.

    Args:
        inner, scale: (..., 1, 1).
        d: (..., 1).
    """
    factor = F * inner
    factor.diagonal(dim1=-2, dim2=-1).add_(d)
    factor = factor.mT  # which it equals, by columns: so it is written over, and nothing else is as large
    info = torch.empty(F.shape[:-2], dtype=torch.int32, device=F.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if on_host(F.device) and not bool(info.any()):
        try:
            found = torch.cholesky_inverse(factor, out=factor).mT.mul_(scale)  # by rows, which the columns equal
        except RuntimeError:  # a zero on the diagonal of one of them
            return factor, torch.zeros_like(info, dtype=torch.bool)
        diagonal = found.diagonal(dim1=-2, dim2=-1)
        return found, None if math.isfinite(diagonal.sum().item()) else torch.isfinite(diagonal).all(dim=-1)
    # not torch.cholesky_inverse, which reads on the host whether it succeeded
    found = torch.cholesky_solve(torch.eye(F.shape[-1], dtype=F.dtype, device=F.device), factor).mT
    # what is not finite shows on the diagonal, row by row: not as a number, or as 0 where the factor is infinite
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    ok = (info == 0) & ((diagonal > 0) & (diagonal < math.inf)).all(dim=-1)
    return found.mul_(scale), ok


def _sides(pair: Pair) -> tuple[_Side, _Side]:
    A, G, damping, shape_A, shape_G, last, whole = pair
    a, g = mean_diagonal(A, shape_A), mean_diagonal(G, shape_G)
    of_A, of_G = strengths(
        torch, a, g, _scalar(damping, A), shape_A, shape_G, torch.finfo(A.dtype).tiny, undivided=whole
    )
    A_inv, G_inv = (None, None) if last is None else last
    return _Side(A, *of_A, shape_A, A_inv), _Side(G, *of_G, shape_G, G_inv)


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
        damped = side.F * _expand(side.inner, side.F, False)
        damped.diagonal(dim1=-2, dim2=-1).add_(side.d.unsqueeze(-1))
        M.append(ops.padded(damped))
    X = [ops.padded(last.clone(memory_format=torch.contiguous_format)) for _, _, last in warm]
    residual = torch.empty(len(X), dtype=torch.float32, device=X[0].device)
    ops.newton_schulz_(X, M, residual)
    left = residual.tolist()
    return {i: x for (i, _, _), x, error in zip(warm, X, left, strict=True) if error <= CONVERGED}


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """0-d; a number is written on the device, not copied to it, which would wait."""
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.full((), value, dtype=like.dtype, device=like.device)


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
