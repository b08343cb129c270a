"""Pure mathematics of the Kronecker factors: running averages, pi, damped inverses. Knows tensors, not modules.

A factor is dense (..., d, d) or, on a side too wide for that, the diagonal (..., d) alone; leading axes are the groups
of a grouped convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_triton import ops

_ESCALATIONS = 6


def average_weights(k: Tensor, decay: float, ok: Tensor) -> tuple[Tensor, Tensor]:
    """(beta, 1 - beta) of the k-th average, F <- beta F + (1 - beta) new, with beta = min(1 - 1/k, decay).

    A flat mean over the first 1 / (1 - decay) updates, an exponential one after; nothing but data enters it (Martens &
    Grosse 2015, section 5). `k` (0-d) counts from 1. Where `ok` is false the average stays: (1, 0).
    """
    beta = torch.clamp(1 - 1 / k.clamp(min=1), max=decay)
    beta = torch.where(ok, beta, torch.ones_like(beta))
    return beta, 1 - beta


def accumulate_(F: Tensor, rows: list[Tensor], alpha: Tensor, beta: Tensor, *, bias: bool, diagonal: bool) -> None:
    """F <- beta F + alpha * sum over the row matrices X of X^T X; with `bias`, of [X, 1]^T [X, 1].

    F (..., d, d), or (..., d) when `diagonal`; every X (..., n, d); alpha and beta 0-d.
    """
    for X in rows:
        if diagonal:
            _accumulate_diagonal_(F, X, alpha, beta, bias)
        else:
            ops.syrk_(F, X, alpha, beta, bias=bias)
        beta = torch.ones_like(beta)


def _accumulate_diagonal_(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, bias: bool) -> None:
    squares = X.to(F.dtype).square().sum(dim=-2)
    if bias:
        squares = torch.cat([squares, squares.new_full((*squares.shape[:-1], 1), X.shape[-2])], dim=-1)
    kept = torch.where(beta == 0, torch.zeros_like(F), beta * F)
    F.copy_(torch.where(alpha == 0, kept, kept + alpha * squares))


def mean_diagonal(F: Tensor, *, diagonal: bool) -> Tensor:
    """tr F / dim F, shape (...)."""
    return (F if diagonal else F.diagonal(dim1=-2, dim2=-1)).mean(dim=-1)


def damped_factors(A: Tensor, G: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """A + pi gamma I and G + gamma / pi I of dense factors, as `damped_inverses` inverts them."""
    a, g = mean_diagonal(A, diagonal=False), mean_diagonal(G, diagonal=False)
    gamma = torch.as_tensor(damping, dtype=A.dtype, device=A.device).sqrt()
    present = (a > torch.finfo(A.dtype).tiny) & (g > torch.finfo(A.dtype).tiny)
    pi = torch.where(present, (a / g).sqrt(), torch.ones_like(a))
    A, G = torch.where(present, A, 0.0), torch.where(present, G, 0.0)
    A.diagonal().add_(pi * gamma)
    G.diagonal().add_(gamma / pi)
    return A, G


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
    a, g = mean_diagonal(A, diagonal=diagonal_A), mean_diagonal(G, diagonal=diagonal_G)
    gamma = torch.as_tensor(damping, dtype=A.dtype, device=A.device).sqrt()
    smallest = torch.finfo(A.dtype).tiny  # below, 1 / a overflows
    present = (a > smallest) & (g > smallest)
    a, g = torch.where(present, a, 1.0), torch.where(present, g, 1.0)
    d = torch.where(present, gamma / (a.sqrt() * g.sqrt()), gamma)
    inverses: list[Tensor] = []
    for F, scale, diagonal in ((A, a, diagonal_A), (G, g, diagonal_G)):
        inverse = _inverse_of_sum(F, torch.where(present, 1 / scale, 0.0), d, diagonal=diagonal)
        if inverse is None:
            return None
        inverses.append(inverse.mul_(_expand(1 / scale, inverse, diagonal)))
    return inverses[0], inverses[1]


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
    # cholesky_inverse raises on a factor with a zero on its diagonal
    if bool((info != 0).any() | ~torch.isfinite(factor).all()):
        return None
    inverse = torch.cholesky_inverse(factor)
    return inverse if bool(torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all()) else None
