"""Moments of patches from those of pixels, where activations at different places of an image are uncorrelated.

Of the second moments S = [[S_xx, s], [s^T, t]] of the pixels x (C,) and a homogeneous 1, with the covariance
C = S_xx - s s^T / t, the patches of k taps have (Grosse & Martens 2016, section 3: spatially uncorrelated activations)

    A = [[I_k (x) C + (1_k (x) s)(1_k (x) s)^T / t,  1_k (x) s],  [.,  t]]

one covariance for every tap, and nothing but the means shared between taps. S takes (C + 1)^2 numbers instead of
(k C + 1)^2, no patch is written, and the inverse takes C^3 operations instead of (k C)^3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def parts(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(covariance (..., C, C), means s (..., C), t (...)); zeros where there is no data."""
    s, t = S[..., :-1, -1], S[..., -1, -1]
    safe = torch.where(t > 0, t, 1.0)
    return S[..., :-1, :-1] - s.unsqueeze(-1) * s.unsqueeze(-2) / safe[..., None, None], s, t


def expanded(S: Tensor, taps: int, bias: bool) -> Tensor:
    """A (..., k C [+ 1], k C [+ 1]), the taps outermost as in `layout`."""
    covariance, s, t = parts(S)
    m = s.repeat(*(1,) * (s.dim() - 1), taps)
    safe = torch.where(t > 0, t, 1.0)[..., None, None]
    A = _on_every_tap(covariance, taps) + m.unsqueeze(-1) * m.unsqueeze(-2) / safe
    if not bias:
        return A
    return torch.cat([torch.cat([A, m.unsqueeze(-1)], -1), torch.cat([m, t.unsqueeze(-1)], -1).unsqueeze(-2)], -2)


def mean_diagonal(S: Tensor, taps: int, bias: bool) -> Tensor:
    """tr A / dim A of the expanded A, shape (...)."""
    pixels, t = S.diagonal(dim1=-2, dim2=-1)[..., :-1], S[..., -1, -1]
    total = taps * pixels.sum(dim=-1) + (t if bias else 0)
    return total / (taps * pixels.shape[-1] + int(bias))


def inverse(S: Tensor, P_inv: Tensor, d: Tensor, taps: int, bias: bool) -> Tensor:
    """(A + d I)^-1 from P_inv = (C + d I)^-1, by the formula of a matrix plus one of rank one, twice.

    With q = P^-1 s, sigma = k s^T q, c = t + d and kappa = 1/t - 1/c (without bias 1/t): the taps' block is
    I_k (x) P^-1 - kappa / (1 + kappa sigma) (1 (x) q)(1 (x) q)^T, its border -(1 (x) q) / (c (1 + kappa sigma)), its
    corner 1/c + sigma / (c^2 (1 + kappa sigma)).
    """
    _, s, t = parts(S)
    safe = torch.where(t > 0, t, 1.0)
    c = t + d
    kappa = torch.where(t > 0, 1 / safe - (1 / c if bias else 0.0), 0.0)
    q = (P_inv @ s.unsqueeze(-1)).squeeze(-1)
    sigma = taps * (s * q).sum(dim=-1)
    left = 1 / (1 + kappa * sigma)
    wide = q.repeat(*(1,) * (q.dim() - 1), taps)
    A_inv = _on_every_tap(P_inv, taps) - (kappa * left)[..., None, None] * wide.unsqueeze(-1) * wide.unsqueeze(-2)
    if not bias:
        return A_inv
    border = -wide * (left / c).unsqueeze(-1)
    corner = 1 / c + sigma * left / c**2
    last = torch.cat([border, corner.unsqueeze(-1)], -1).unsqueeze(-2)
    return torch.cat([torch.cat([A_inv, border.unsqueeze(-1)], -1), last], -2)


def _on_every_tap(M: Tensor, taps: int) -> Tensor:
    """I_k (x) M."""
    C = M.shape[-1]
    wide = M.new_zeros(*M.shape[:-2], taps, C, taps, C)
    wide.diagonal(dim1=-4, dim2=-2).copy_(M.unsqueeze(-1))
    return wide.flatten(-4, -3).flatten(-2, -1)
