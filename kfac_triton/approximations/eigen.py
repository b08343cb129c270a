"""Block-diagonal Fisher, damped as a whole: (G_i (x) A_i + damping I)^-1 in the eigenbases of the factors.

The Kronecker form of the inverse damps each factor, (A + pi gamma I) (x) (G + gamma / pi I), and so adds terms beyond
damping I; in the eigenbases A = Q_A diag(lambda_A) Q_A^T and G = Q_G diag(lambda_G) Q_G^T nothing is added (George et
al. 2018 start here, with eigenvalues measured anew, which these are not):

    V = Q_G [(Q_G^T grad Q_A) / (lambda_G lambda_A^T + damping)] Q_A^T

In the state of a weight: `Q_A`, `Q_G`, `lambda_A`, `lambda_G` and `eigen_damping` (0-d), refreshed when inverses are.
A refresh takes some 20 d^3 operations for each side, where a Cholesky inverse takes d^3, and a step four products
instead of two. A weight with a diagonal side keeps the Kronecker form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.approximations import kronecker
from kfac_triton.approximations.kronecker import Refresh
from kfac_triton.blocks.layout import Layout

NAMES = ("Q_A", "Q_G", "lambda_A", "lambda_G", "eigen_damping")


def update_bases(refreshes: Sequence[Refresh]) -> list[bool]:
    """Refreshes the eigenbases of many weights; false where none were found and the last ones stay."""
    present = [refresh for refresh in refreshes if refresh.state["factor_updates"] > 0]
    kronecker.settle([refresh.state for refresh in present])
    return [_update(refresh) for refresh in refreshes]


def _update(refresh: Refresh) -> bool:
    state, layout, damping = refresh
    if layout.diagonal_A or layout.diagonal_G:
        return kronecker.update_inverses([refresh])[0]
    if not state["factor_updates"] > 0:
        return True
    bases = [_basis(state[name]) for name in "AG"]
    if any(basis is None for basis in bases):
        return False
    for name, basis in zip("AG", bases, strict=True):
        assert basis is not None
        state[f"lambda_{name}"], state[f"Q_{name}"] = basis
    state["eigen_damping"] = torch.as_tensor(damping, dtype=state["A"].dtype, device=state["A"].device).clone()
    return True


def _basis(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, none below 0, and eigenvectors as columns, rows contiguous; None where F is not finite."""
    if not bool(torch.isfinite(F).all()):
        return None
    try:
        values, vectors = torch.linalg.eigh(F)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        values, vectors = (t.to(F.dtype) for t in torch.linalg.eigh(F.double()))
    return values.clamp(min=0.0), vectors.contiguous()


def memory(weight: Tensor, layout: Layout) -> int:
    """Bytes of the eigenvalues; the eigenvectors take as many as the factors."""
    if layout.diagonal_A or layout.diagonal_G:
        return 0
    return int(kronecker.factor_dtype(weight).itemsize) * layout.groups * sum(layout.dims(weight.shape))


def stored(state: dict[str, Any]) -> bool:
    """Whether there are bases in the state of a weight."""
    return "Q_A" in state


def ready(state: dict[str, Any]) -> bool:
    """Whether the state of a weight holds what a step multiplies with: bases, or inverses."""
    return stored(state) or "A_inv" in state
