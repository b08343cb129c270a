"""Sums of gradients over time whose terms depend on the ones before (Martens, Ba & Johnson 2018, section 3.5).

The gradient of a recurrent weight is a sum over T time steps, of w_t = vec(g_t a_t^T). With F_d = cov(w_{t+d}, w_t),
"independent" takes F_d = 0 for d > 0, the ordinary factors. Here the w_t are a stationary chain instead, each depending
on the last alone: F_d = Psi^d F_0, Psi = F_1 F_0^-1, with F_0 = A (x) G and F_1 = A_1 (x) G_1, moments of neighbours.
Then (with C0, C1 either side's moments, C0 damped, and everything relative to the independent form)

    chain_symmetric   C1 made symmetric, Psi_C = C0^-1/2 C1 C0^-1/2 = U psi U^T, K_C = C0^-1/2 U:
                      Z = K_G [(K_G^T V K_A) o gamma(psi_G psi_A^T)] K_A^T,
                      gamma(x) = T (1 - x)^2 / (T (1 - x^2) - 2 x (1 - x^T));    exact for such a chain
    chain             no symmetry asked for, but T large: Psi_C = C0^-1/2 C1 C0^-1/2, (mu, E) = eig(Psi_C^T Psi_C),
                      K_C = C0^-1/2 E, P_C = C1^T C0^-1:
                      Z = V - P_G V P_A^T;  Z = K_G [(K_G^T Z K_A) / (1 - mu_G mu_A^T)] K_A^T;  Z = Z - P_G^T Z P_A
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac_triton.linalg import factors

NEAREST = 1 - 1e-4  # correlations of one step to the next are at most that: beyond, the formulas lose their digits


class Transform(NamedTuple):
    """What preconditions a gradient V; `P_A`, `P_G` empty where the chain is symmetric."""

    K_A: Tensor
    K_G: Tensor
    scale: Tensor
    P_A: Tensor
    P_G: Tensor


def product(V: Tensor, own: Transform) -> Tensor:
    """Z for the gradient V (d_out, d_in)."""
    K_A, K_G, scale, P_A, P_G = own
    Z = V - P_G @ V @ P_A.mT if P_A.numel() else V
    Z = K_G @ ((K_G.mT @ Z @ K_A) * scale) @ K_A.mT
    return Z - P_G.mT @ Z @ P_A if P_A.numel() else Z


def transform(
    A: Tensor, G: Tensor, A_lag: Tensor, G_lag: Tensor, steps: float, damping: float | Tensor, *, symmetric: bool
) -> Transform | None:
    """The transform of one weight; A and G get factored damping, the moments of neighbours none. None: not finite."""
    wide = [t.double() for t in (A, G, A_lag, G_lag)]
    if not all(bool(torch.isfinite(t).all()) for t in wide):
        return None
    damped = factors.damped_factors(wide[0], wide[1], damping)
    side = _symmetric if symmetric else _general
    K_A, P_A, of_A = side(damped[0], wide[2])
    K_G, P_G, of_G = side(damped[1], wide[3])
    x = of_G.unsqueeze(-1) * of_A.unsqueeze(-2)
    scale = relative_inverse(x, max(1, round(steps))) if symmetric else 1 / (1 - x.clamp(max=NEAREST))
    return Transform(*(t.to(A.dtype).contiguous() for t in (K_A, K_G, scale, P_A, P_G)))


def _root(C: Tensor) -> Tensor:
    """C^-1/2."""
    values, vectors = torch.linalg.eigh(C)
    root: Tensor = vectors * values.clamp(min=torch.finfo(C.dtype).tiny).rsqrt() @ vectors.mT
    return root


def _symmetric(C0: Tensor, C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = _root(C0)
    psi, U = torch.linalg.eigh(root @ ((C1 + C1.mT) / 2) @ root)
    return root @ U, C0.new_empty(0), psi.clamp(-NEAREST, NEAREST)


def _general(C0: Tensor, C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = _root(C0)
    Psi = root @ C1 @ root
    mu, E = torch.linalg.eigh(Psi.mT @ Psi)
    return root @ E, C1.mT @ root @ root, mu.clamp(0, 1)


def relative_inverse(x: Tensor, steps: int) -> Tensor:
    """gamma(x), T over the sum of x^|t - s| over T times t and s."""
    x = x.clamp(-NEAREST, NEAREST)
    return steps * (1 - x) ** 2 / (steps * (1 - x**2) - 2 * x * (1 - x**steps))
