"""Eigenvalue-corrected Kronecker factors, EKFAC (George et al. 2018), damped as the factors are.

The factors give the eigenbases, A = Q_A diag(.) Q_A^T and G = Q_G diag(.) Q_G^T; the eigenvalues in that basis are
measured, as the second moments of the examples' gradients there, which no other diagonal brings nearer to the Fisher:

    F ~ (Q_G (x) Q_A) diag(S) (Q_G (x) Q_A)^T,    S_ij = sum over examples n of (Q_G^T grad_n Q_A)_ij^2 / L
    V = Q_G [(Q_G^T grad Q_A) / (S + D)] Q_A^T,    D_ij = damping + sqrt(damping) (pi g_i + a_j / pi)

grad_n is the sum of g a^T over the positions of one example. a_j and g_i are the factors' eigenvalues, so that D is
what factored damping adds to their products. The damping alone would leave a direction that only one factor knows
nearly undamped; where inputs are zero or nearly so, most directions are such, and steps along them raise the loss.

S is a running average by the rule of the factors, refreshed with every factor update, the bases when inverses are; new
bases take S along, as the diagonal that the last form of F has in them, (R_G o R_G) S (R_A o R_A)^T with R = Q_new^T
Q_old. Until there are examples to measure with (an empirical Fisher's sums have none), S is the product of the factors'
eigenvalues.

In the state of a weight: `Q_A`, `Q_G`, `spectrum` S (d_out, d_in), `spectrum_updates` (0-d) and the parts of D,
`eigen_damping` (0-d), `damping_A` (d_in) and `damping_G` (d_out).
A refresh of the bases takes some 20 d^3 operations for each side, where a Cholesky inverse takes d^3, one of S as many
as the gradient of the weight on as many examples, and a step four products instead of two. A weight with a side that is
not dense keeps the Kronecker form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton import factors
from kfac_triton.approximations import kronecker
from kfac_triton.approximations.kronecker import FactorUpdate, Refresh, Statistics
from kfac_triton.blocks.layout import DENSE, Layout
from kfac_triton.ops import OneHot, Patches

NAMES = ("Q_A", "Q_G", "spectrum", "damping_A", "damping_G", "spectrum_updates", "eigen_damping")
AT_ONCE = 2**24  # entries of examples' gradients that are held at a time


def update_bases(refreshes: Sequence[Refresh]) -> list[bool]:
    """Refreshes the eigenbases of many weights; false where none were found and the last ones stay."""
    present = [refresh for refresh in refreshes if refresh.state["factor_updates"] > 0]
    kronecker.settle([refresh.state for refresh in present])
    return [_update(refresh) for refresh in refreshes]


def _update(refresh: Refresh) -> bool:
    state = refresh.state
    if not _in_bases(refresh.layout):
        return kronecker.update_inverses([refresh])[0]
    if not state["factor_updates"] > 0:
        return True
    found = [_basis(state[name]) for name in "AG"]
    if any(basis is None for basis in found):
        return False
    (lambda_A, Q_A), (lambda_G, Q_G) = (basis for basis in found if basis is not None)
    if float(state.get("spectrum_updates", 0)) > 0:
        R_A, R_G = Q_A.mT @ state["Q_A"], Q_G.mT @ state["Q_G"]
        state["spectrum"] = R_G.square() @ state["spectrum"] @ R_A.square().mT
    else:
        state["spectrum"] = lambda_G.unsqueeze(-1) * lambda_A.unsqueeze(-2)
        state["spectrum_updates"] = torch.zeros((), dtype=torch.float32, device=Q_A.device)
    state["Q_A"], state["Q_G"] = Q_A, Q_G
    damping = torch.as_tensor(refresh.damping, dtype=Q_A.dtype, device=Q_A.device)
    pi = factors.pi_of(lambda_A.mean(dim=-1), lambda_G.mean(dim=-1)).unsqueeze(-1)
    state["eigen_damping"] = damping.clone()
    state["damping_A"], state["damping_G"] = damping.sqrt() / pi * lambda_A, damping.sqrt() * pi * lambda_G
    return True


def damped(state: dict[str, Any]) -> Tensor:
    """S and what factored damping adds beside the damping itself, (d_out, d_in)."""
    S: Tensor = state["spectrum"]
    of_one_side: Tensor = state["damping_G"].unsqueeze(-1) + state["damping_A"].unsqueeze(-2)
    return S + of_one_side


def _in_bases(layout: Layout) -> bool:
    return layout.A == layout.G == DENSE


def _basis(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, none below 0, and eigenvectors as columns, rows contiguous; None where F is not finite."""
    if not bool(torch.isfinite(F).all()):
        return None
    try:
        values, vectors = torch.linalg.eigh(F)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        values, vectors = (t.to(F.dtype) for t in torch.linalg.eigh(F.double()))
    return values.clamp(min=0.0), vectors.contiguous()


def correct(updates: Sequence[FactorUpdate]) -> None:
    """Moves the eigenvalues S of many weights towards what their statistics measure in the bases as they are."""
    for state, own, decay, ok in updates:
        if "Q_A" not in state or own.sums is not None:
            continue
        measured = second_moments(own, state["Q_A"], state["Q_G"])
        k = state["spectrum_updates"]
        k += ok
        beta, share = factors.average_weights(k.to(measured.dtype), decay, ok)
        averaged = beta * state["spectrum"] + share * measured
        state["spectrum"] = torch.where(ok, averaged, state["spectrum"])


def second_moments(own: Statistics, Q_A: Tensor, Q_G: Tensor) -> Tensor:
    """S (d_out, d_in), or with an axis of groups, of these statistics alone."""
    total = Q_G.new_zeros(*Q_G.shape[:-1], Q_A.shape[-1])
    for a, g, examples in _pairs(own, Q_A, Q_G):
        if a.shape[-2] == examples:
            total += g.square().mT @ a.square()
            continue
        by_example = [t.unflatten(-2, (examples, -1)) for t in (a, g)]
        for first in range(0, examples, max(1, AT_ONCE // total.numel())):
            part = slice(first, first + max(1, AT_ONCE // total.numel()))
            gradients = by_example[1][..., part, :, :].mT @ by_example[0][..., part, :, :]
            total += gradients.square().sum(dim=-3)
    return total / kronecker.tensor_of(own.terms, total).clamp(min=1)


def _pairs(own: Statistics, Q_A: Tensor, Q_G: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows of inputs and gradients in the bases, (n, d_in) and (n, d_out), and how many examples they belong to."""
    directions = len(own.g) // len(own.a)
    for i, rows in enumerate(own.a):
        assert not isinstance(rows, OneHot), "tables have no bases"
        a = (rows.rows() if isinstance(rows, Patches) else rows).to(Q_A.dtype)
        a = a.flatten(-3, -2) if a.dim() > Q_A.dim() else a
        if own.ones:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
        a = a @ Q_A
        for g in own.g[i * directions : (i + 1) * directions]:
            g = g.flatten(-3, -2) if g.dim() > Q_G.dim() else g
            yield a, g.to(Q_G.dtype) @ Q_G, (own.examples[i] if own.examples else 0) or a.shape[-2]


def memory(weight: Tensor, layout: Layout) -> int:
    """Bytes of the eigenvalues and their damping; the eigenvectors take as many as the factors."""
    d_in, d_out = layout.dims(weight.shape)
    elements = layout.groups * (d_in * d_out + d_in + d_out)
    return int(kronecker.factor_dtype(weight).itemsize) * elements if _in_bases(layout) else 0


def stored(state: dict[str, Any]) -> bool:
    """Whether there are bases in the state of a weight, and their damping."""
    return "damping_A" in state


def ready(state: dict[str, Any]) -> bool:
    """Whether the state of a weight holds what a step multiplies with: bases, or inverses."""
    return stored(state) or "A_inv" in state
