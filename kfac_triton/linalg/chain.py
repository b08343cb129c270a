"""The block-tridiagonal inverse for a chain of layers, as pure mathematics (Martens & Grosse 2015, section 4.3).

With F_i,j = A_i,j (x) G_i,j, the inverse that matches F on its three block diagonals and has none beyond is

    Xi^T Lambda Xi,    Xi = I - Psi on the block super-diagonal,    Lambda = blkdiag(Sigma_1^-1, ..., Sigma_l^-1)
    Psi_i = PsiA_i (x) PsiG_i,    PsiA_i = A_i,i+1 A_i+1^-1,    PsiG_i = G_i,i+1 G_i+1^-1
    Sigma_i = A_i (x) G_i - (PsiA_i A_i+1 PsiA_i^T) (x) (PsiG_i G_i+1 PsiG_i^T)  (i < l),    Sigma_l = A_l (x) G_l

A link stands between layers i and i + 1 and holds what layer i needs of it. It takes four matrices of the layers' sizes
where the block-diagonal inverse takes two, two eigendecompositions a refresh (some 20 d^3 operations each, where a
Cholesky inverse takes d^3), and four more matrix products a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """`psi_A` (d_in_i, d_in_i+1), `psi_G` (d_out_i, d_out_i+1); Sigma_i^-1 in the bases `K_A`, `K_G` of the sides, in
    which it is the division by 1 - s_G s_A^T."""

    psi_A: Tensor
    psi_G: Tensor
    K_A: Tensor
    K_G: Tensor
    s_A: Tensor
    s_G: Tensor


def link(
    A: Tensor, G: Tensor, A_cross: Tensor, G_cross: Tensor, A_next: Tensor, A_next_inv: Tensor, G_next: Tensor,
    G_next_inv: Tensor,
) -> Link | None:  # fmt: skip
    """The link from damped factors of layer i and i + 1 and their undamped cross moments A_i,i+1, G_i,i+1.

    None where a side has no Cholesky factor or no finite basis.
    """
    psi_A, psi_G = A_cross @ A_next_inv, G_cross @ G_next_inv
    sides = [_joint_basis(F, psi @ F_next @ psi.mT) for F, psi, F_next in ((A, psi_A, A_next), (G, psi_G, G_next))]
    if sides[0] is None or sides[1] is None:
        return None
    (K_A, s_A), (K_G, s_G) = sides[0], sides[1]
    return Link(psi_A, psi_G, K_A, K_G, s_A, s_G)


def _joint_basis(F: Tensor, C: Tensor) -> tuple[Tensor, Tensor] | None:
    """(K, s) with K^T F K = I and K^T C K = diag(s), s clipped to [0, 1], where C <= F in theory."""
    L, info = torch.linalg.cholesky_ex(F)
    if bool((info != 0) | ~torch.isfinite(L).all() | ~torch.isfinite(C).all()):
        return None
    half = torch.linalg.solve_triangular(L, C, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    s, E = torch.linalg.eigh((whitened + whitened.mT) / 2)
    K = torch.linalg.solve_triangular(L.mT, E, upper=True).contiguous()
    return (K, s.clamp(0, 1)) if bool(torch.isfinite(K).all()) else None


def solve_difference(V: Tensor, K_A: Tensor, K_G: Tensor, s_A: Tensor, s_G: Tensor) -> Tensor:
    """(A (x) G - C (x) D)^-1 V for V (d_out, d_in), where K_A^T A K_A = I, K_A^T C K_A = diag(s_A), and likewise G, D.

    A direction in which both sides vanish is left as it is, as in the authors' code.
    """
    remaining = 1 - s_G.unsqueeze(-1) * s_A
    tiny = torch.finfo(V.dtype).eps
    divided = (K_G.mT @ V @ K_A) / torch.where(remaining > tiny, remaining, torch.ones_like(remaining))
    return K_G @ divided @ K_A.mT


def product(grads: Sequence[Tensor], links: Sequence[Link], A_inv: Tensor, G_inv: Tensor) -> list[Tensor]:
    """The inverse times the gradients, (d_out, d_in) each, in the chain's order; A_inv, G_inv of its last layer."""
    U = [grads[i] - one.psi_G @ grads[i + 1] @ one.psi_A.mT for i, one in enumerate(links)] + [grads[-1]]
    U = [solve_difference(u, *one[2:]) for u, one in zip(U[:-1], links, strict=True)] + [G_inv @ U[-1] @ A_inv]
    return [U[0]] + [U[i + 1] - one.psi_G.mT @ U[i] @ one.psi_A for i, one in enumerate(links)]
